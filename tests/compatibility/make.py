"""Makes the runs of this folder: tiny ones, stopped midway, with what they go on to compute.

python -m tests.compatibility.make format_5              # in the format that is written now, those not there yet
python -m tests.compatibility.make format_5 alibi bpe    # these alone, where only they differ from the format before

A run of each format that was ever written stays here unchanged: later versions must resume and sample it. So this
script adds runs and never writes one again.
"""

import argparse
import json
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from generation.decode import generate
from generation.sampler import Sampler
from generation.state import GenerationState
from tests.support import call
from tests.training.parallel.together import train_together
from training.metrics_file import read_metrics
from training.run.load import load_run

HERE = Path(__file__).parent
STOPPED, STEPS, TOKENS = 6, 26, 40
RUN = [
    *("batch_tokens=64", "micro_batch_size=1", f"steps={STEPS}", f"save_every={STOPPED}", "keep_last=9"),
    *("eval_every=1000", "eval_tokens=64", "tune_malloc=false", "device=cpu"),
]
MODEL = [
    "model=tiny",
    "model.n_layers=2",
    "model.d_model=16",
    "model.n_heads=2",
    "model.context_length=32",
    "mlp.d_ff=4",
]
TINY = [*MODEL, *RUN]
WORDS = [*TINY, "data=synthetic", "data.size=30", "tokenizer=byte"]
MIX = "data.parts={a: {quota: 1, data: synthetic, size: 20}, b: {quota: 2, data: synthetic, size: 30, seed: 1}}"
NARROW = {
    "mha": ["attention=mha", "attention.head_dim=4"],
    "mla": ["attention=mla"],
    "stack": ["attention=stack", "attention.parts.local.head_dim=4", "attention.parts.global.head_dim=4"],
}
CASES = {
    **{
        f"{attention}_{optim}_{precision}": [*WORDS, *choice, f"optim={optim}", f"precision={precision}"]
        for attention, choice in NARROW.items()
        for optim in ("muon", "adamw")
        for precision in ("fp32", "bf16", "fp16")
    },
    "document_mask": [*WORDS, "attention=gqa", "document_mask=true", "precision=fp32"],
    "mix": [*TINY, "data=mix", MIX, "tokenizer=byte", "precision=fp32"],
    "qk_clip": [*WORDS, "attention=mla", "optim.qk_clip=0.05", "precision=fp32"],
    "alibi": [*WORDS, "position=alibi", "model.n_heads=6", "attention.head_dim=2", "precision=fp32"],
    "window": [*WORDS, "attention=mqa", "attention.window=8", "model.dropout=0.1", "schedule=wsd", "precision=fp32"],
    "classic_gpt": [*WORDS, "model=classic_gpt", "model.tie_embeddings=true", "precision=fp32"],
    "bpe": [*TINY, "data=synthetic", "data.size=30", "tokenizer=bpe", "tokenizer.vocab_size=300", "precision=fp32"],
    "files": [*TINY, "data=files", "data.path=texts/*.txt", "tokenizer=byte", "precision=fp32"],
    "lines": [*TINY, "data=files", "data.path=texts/*.txt", "data.document=line", "tokenizer=byte", "precision=fp32"],
    "rows": [*TINY, "data=files", "data.path=texts/rows.jsonl", "tokenizer=byte", "precision=fp32"],
    "hub": [*TINY, "data=hub", "data.path=texts/table", "data.val_fraction=0.1", "tokenizer=byte", "precision=fp32"],
    "groups": [
        *(*WORDS, "attention=gqa", "precision=fp32", "model.zero_init=false"),
        "optim.groups=[{match: '*.mlp.*', train: false}, {match: '*.attention.*', lr: 0.01, weight_decay: 0.2}]",
    ],
    "dsa": [*WORDS, "attention=dsa", "attention.indexer.top_k=8", "precision=fp32"],
    "mtp": [*WORDS, "attention=gqa", "model.mtp_depth=1", "document_mask=true", "precision=fp32"],
    "adafactor": [*WORDS, "attention=gqa", "optim=adafactor", "precision=fp32"],
    "ddp": [*WORDS, "attention=mha", "optim=adamw", "batch_tokens=128", "precision=fp32", "parallel=ddp"],
    "fsdp": [*WORDS, "attention=gqa", "optim=muon", "batch_tokens=128", "precision=fp32", "parallel=fsdp"],
    "qwen2": [
        *(*WORDS, "attention=gqa", "mlp=swiglu", "model.qk_norm=false", "precision=fp32"),
        *("attention.v_bias=true", "model.norm_eps=1e-5"),
    ],
    "mlp_bias": [*WORDS, "attention=gqa", "mlp=swiglu", "model.bias=true", "mlp.bias=false", "precision=fp32"],
    "init_from": [*RUN, "init_from=base", "data=synthetic", "data.size=30", "data.seed=7", "precision=fp32"],
}


def changed(overrides: list[str]) -> list[str]:
    """Of overrides of one setting, the last."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def texts(folder: Path) -> None:
    """What the cases read from files, the same at any time."""
    rows = [f"Line {i} of a text: {i * i} is the square of {i}, and {i * i * i} its cube." for i in range(60)]
    (folder / "table").mkdir(parents=True)
    (folder / "squares.txt").write_text("\n".join(rows) + "\n")
    (folder / "again.txt").write_text("\n\n".join(reversed(rows)) + "\n")
    content = "".join(json.dumps({"text": row, "number": i}) + "\n" for i, row in enumerate(rows))
    (folder / "rows.jsonl").write_text(content)
    (folder / "table" / "rows.jsonl").write_text(content)


def machine() -> list[str]:
    """What bits depend on: where it is the same, they must be."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)) if cpuinfo.exists() else {}
    names = ("vendor_id", "cpu family", "model", "stepping", "cache size")
    processor = [f"{name} {fields.get(name)}" for name in names] if fields else [platform.machine()]
    return [*processor, torch.backends.cpu.get_cpu_capability(), torch.__version__]


def sampled(run: Path, sampler: Sampler) -> list[int]:
    """What follows the end-of-text token, beyond the context of 32 tokens too."""
    model, tokenizer = load_run(run)
    state = GenerationState(model, [[tokenizer.end_of_text]], [0], slide=True)
    return [int(step) for step in generate(model, state, sampler, max_new_tokens=TOKENS)]


def losses_after(run: Path) -> list[float | None]:
    """Of the steps after STOPPED; None where one was skipped."""
    return [row["train_loss"] for row in read_metrics(run / "metrics.jsonl") if row["step"] > STOPPED]


def train(overrides: list[str], patch: pytest.MonkeyPatch, case: str) -> None:
    """Run train.py, in two processes where the case is of them."""
    if case in ("ddp", "fsdp"):
        assert [one.code for one in train_together(Path.cwd(), *overrides)] == [0, 0]
    else:
        assert call("train", overrides, patch) == 0


def make(run: Path) -> None:
    """Leaves the run as a kill after STOPPED steps would, with what follows in expected.json."""
    kept = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] <= STOPPED]
    losses = losses_after(run)
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name != f"step_{STOPPED:08d}":
            shutil.rmtree(checkpoint)
    for name in ("environment.yaml", "loss.png", ".lock"):
        (run / name).unlink(missing_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    expected = {
        "machine": machine(),
        "losses": losses,
        "greedy": sampled(run, Sampler(temperature=0.0)),
        "drawn": sampled(run, Sampler(temperature=0.8, top_k=50)),
    }
    (run / "expected.json").write_text(json.dumps(expected, indent=0) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of this folder, as format_4")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; unset: all")
    args = parser.parse_args()
    final = HERE / args.folder
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.chdir(name)
        texts(Path("texts"))
        assert call("train", changed([*CASES["mha_muon_fp32"], "steps=10", "run_dir=base"]), patch) == 0
        for case, overrides in CASES.items():
            if case in (args.cases or CASES) and not (final / case).exists():
                train(changed([*overrides, f"run_dir={case}"]), patch, case)
                make(Path(case))
                shutil.copytree(case, final / case)


if __name__ == "__main__":
    main()
