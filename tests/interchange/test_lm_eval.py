"""The adapter to lm-evaluation-harness gives what the model gives in transformers, and runs tasks of local files."""

import json

import pytest
import torch

from tests.interchange.published import save, theirs

lm_eval = pytest.importorskip("lm_eval")

TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: %s
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
%s
metric_list: [{metric: %s}]
"""
TASKS = {
    "choices": TASK % ("multiple_choice", 'doc_to_choice: ["a b", " c", "dd"]', "acc"),
    "written": TASK % ("generate_until", 'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}', "exact_match"),
    "rolling": TASK.replace('doc_to_target: "{{answer}}"', 'doc_to_target: "{{question}}"')
    % ("loglikelihood_rolling", "", "bits_per_byte"),
}


@pytest.fixture
def harness(workplace, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from interchange.lm_eval import HeadroomLM

    model = theirs("qwen3")
    folder = save(model, workplace / "model")
    return HeadroomLM(run=f"hf:{folder}", device="cpu"), model


def test_adapter_gives_the_likelihoods_and_texts_of_transformers(harness):
    from lm_eval.api.instance import Instance

    mine, model = harness
    pairs = [("def f(", "x):"), ("", "abc"), ("x" * 80, " y"), ("a ", "b")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = mine.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        tokens = torch.tensor([([256] if not context else list(context.encode())) + list(continuation.encode())])[
            :, -65:
        ]
        n = len(continuation) + (context.endswith(" "))
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits[0, -n:].log_softmax(-1)
        targets = tokens[0, -n:]
        assert score == pytest.approx(logits.gather(1, targets[:, None]).sum().item(), rel=1e-4)
        assert greedy == bool((logits.argmax(-1) == targets).all())
    (rolling,) = mine.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, ("word " * 30,), 0)], disable_tqdm=True
    )
    assert rolling < -100
    asked = {"until": ["q"], "max_gen_toks": 12}
    (text,) = mine.generate_until([Instance("generate_until", {}, ("def f(", asked), 0)], disable_tqdm=True)
    with torch.no_grad():
        prompt = torch.tensor([list(b"def f(")])
        written = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=256, pad_token_id=0)[0, 6:]
    whole = bytes(token for token in written.tolist() if token < 256).decode(errors="replace")
    assert text == whole.split("q")[0]


@pytest.mark.parametrize("kind", TASKS)
def test_task_of_local_files_is_evaluated(kind, harness, workplace):
    rows = [{"question": f"What is {i}?", "answer": str(i % 3)} for i in range(6)]
    (workplace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workplace / "tasks").mkdir()
    (workplace / "tasks/words.yaml").write_text(TASKS[kind])
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(workplace / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(model=harness[0], tasks=["words"], task_manager=manager, bootstrap_iters=0)
    (value,) = [
        value for name, value in found["results"]["words"].items() if name.endswith(",none") and "stderr" not in name
    ]
    assert value >= 0 and found["n-samples"]["words"]["effective"] == 6
