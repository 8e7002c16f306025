"""The two programs as a user meets them: what they print, what they leave, what they refuse."""

import re
import subprocess
import sys
import time

import pytest

from tests.support import ROOT, SMOKE, call


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one trained run of each kind."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("place")
        patch.chdir(folder)
        for attention in ("gqa", "mla"):
            assert call("train", [*SMOKE, f"attention={attention}", f"run_dir=runs/{attention}"], patch) == 0
    return folder


def sample(place, monkeypatch, capsys, *arguments: str) -> tuple[str, str]:
    monkeypatch.chdir(place)
    assert call("sample", arguments, monkeypatch) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_training_ends_with_what_a_user_wants_to_know(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "sample_every=20", "sample_prompt=The key"], monkeypatch) == 0
    out, err = capsys.readouterr()
    (run,) = (workplace / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-[a-z]+-[a-z]+", run.name)
    assert re.search(r"validation +\d\.\d+ nats per token, \d\.\d+ bits per byte", out)
    assert re.search(r"speed +[\d,]+ training tokens per second", out)
    assert f"runs/{run.name}" in out and "python sample.py" in out and "The key" in out.split("validation")[0]
    assert "step 30/30" in err and "micro-batches" in err
    assert err.count("The key") >= 1  # the preview at step 20


def test_two_runs_in_one_second_have_two_folders(workplace, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    monkeypatch.setattr("random.choice", lambda words: words[0])
    for _ in range(2):
        assert call("train", [*SMOKE, "steps=1"], monkeypatch) == 0
    assert len(list((workplace / "runs").glob("*/config.yaml"))) == 2


def test_sampling_is_seeded_streams_whole_text_and_takes_the_newest_run(place, monkeypatch, capsys):
    first, err = sample(place, monkeypatch, capsys, "The query", "--seed", "3", "--max-new-tokens", "30")
    assert first.startswith("The query") and "run runs/mla" in err
    assert sample(place, monkeypatch, capsys, "The query", "--seed", "3", "--max-new-tokens", "30")[0] == first
    assert sample(place, monkeypatch, capsys, "The query", "--seed", "4", "--max-new-tokens", "30")[0] != first
    assert len(first.rstrip("\n")) <= len("The query") + 30


@pytest.mark.parametrize("execution", ["naive", "expanded", "absorbed"])
def test_every_way_to_decode_writes_the_same_text(place, monkeypatch, capsys, execution):
    arguments = ["A head = ", "--run", "runs/mla", "--max-new-tokens", "40", "--top-k", "20"]
    expected, _ = sample(place, monkeypatch, capsys, *arguments, "--no-cache", "--kernel", "naive")
    assert sample(place, monkeypatch, capsys, *arguments, "--execution", execution)[0] == expected


def test_stats_are_counted(place, monkeypatch, capsys):
    for run, numbers in (("gqa", 2 * 2 * 16), ("mla", 16 + 4)):
        _, err = sample(place, monkeypatch, capsys, "The", "--run", f"runs/{run}", "--stats", "--max-new-tokens", "5")
        assert f"cache_bytes_per_token={2 * 4 * numbers}\n" in err
        assert float(re.search(r"decode_tokens_per_second=(.*)", err)[1]) > 0
        assert float(re.search(r"prefill_tokens_per_second=(.*)", err)[1]) > 0


def test_a_full_context_is_said(place, monkeypatch, capsys):
    _, err = sample(place, monkeypatch, capsys, "The", "--run", "runs/gqa", "--max-new-tokens", "500", "--seed", "1")
    assert "[the context of 64 tokens is full]" in err


def test_streaming_never_splits_a_character(workplace, monkeypatch, capsys):
    """A byte-level model that has learned nothing but one line of two- to four-byte characters."""
    (workplace / "a.txt").write_text("é漢🙂ñ字🦉\n" * 400)
    options = ["experiment=smoke", "data=files", "data.path=a.txt", "steps=40", "optim.lr=1e-2", "run_dir=run"]
    assert call("train", [*options, "tune_malloc=false"], monkeypatch) == 0
    capsys.readouterr()
    pieces = []
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    assert call("sample", ["é漢", "--run", "run", "--temperature", "0", "--max-new-tokens", "40"], monkeypatch) == 0
    assert "🙂ñ字🦉\né漢🙂" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces[:-2])  # at the end, what is cut off may show


BAD_SAMPLES = {
    "a long prompt": (["x" * 64], "the prompt has 64 tokens, the context holds 64"),
    "cold": (["x", "--temperature", "-1"], "--temperature: '-1'"),
    "top-p beyond 1": (["x", "--top-p", "7"], "--top-p: '7'"),
    "top-k of nothing": (["x", "--top-k", "0"], "--top-k: '0'"),
    "nan": (["x", "--temperature", "nan"], "--temperature: 'nan'"),
    "unknown flag": (["x", "--tempreature", "1"], "--tempreature"),
    "unknown run": (["x", "--run", "runs/none"], "runs/none is not a run"),
    "execution of GQA": (["x", "--run", "runs/gqa", "--execution", "absorbed"], "runs in one way only"),
    "device of no use": (["x", "--device", "meta"], "device=meta"),
    "endless": (["x", "--max-new-tokens", "9" * 400], "--max-new-tokens"),
    "hot": (["x", "--temperature", "inf"], "--temperature: 'inf'"),
    "no CUDA": (["x", "--device", "cuda:9"], "device=cuda:9"),
    "nonsense device": (["x", "--device", "toaster"], "device=toaster"),
}


@pytest.mark.parametrize(("arguments", "complaint"), BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_sampling_refuses_in_one_line(place, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(place)
    assert call("sample", arguments, monkeypatch) == 2
    out, err = capsys.readouterr()
    assert complaint in err and err.count("\n") == 1 and out == ""


BAD_RUNS = {
    "attention": (["attention=gqaa"], "attention=gqaa: choose one of gqa, mha, mla, mqa"),
    "heads": (["model=gpt2", "attention=gqa", "attention.n_kv_heads=5"], "n_kv_heads=5 does not divide n_heads=12"),
    "no attention": (["attention=null"], "attention=null: choose one of gqa, mha, mla, mqa"),
    "numbered model": (["model=5"], "model=5: choose one of gpt2, small, tiny"),
    "nearly": (["attention.n_kv_head=2"], "no such setting of attention=mha; did you mean n_kv_heads?"),
    "of another choice": (
        ["attention=mla", "attention.n_kv_heads=2"],
        "of attention=mla; it belongs to attention=gqa or mha or mqa",
    ),
    "a folder": (["data=files", "data.path=taken"], "data.path='taken' is a folder: write taken/*"),
    "key": (["foo=1"], "foo: no such setting; valid: model,"),
    "added key": (["+foo=1"], "foo=1: no such key"),
    "type": (["steps=abc"], "steps=abc"),
    "grammar": (["data.path=a=b", "data=files"], "cannot read 'data.path=a=b'"),
    "glob": (["data=files", "data.path='nothing/*.txt'"], "matches no file"),
    "empty file": (["data=files", "data.path=empty.txt"], "empty.txt is empty"),
    "binary file": (["data=files", "data.path=binary.txt"], "binary.txt holds NUL bytes"),
    "column": (["data=files", "data.path=rows.jsonl", "data.column=tekst"], "rows.jsonl has text: choose one of them"),
    "a row that is none": (["data=files", "data.path=rows.jsonl"], "rows.jsonl:2 is not JSON"),
    "no vocabulary": (["tokenizer=cl100k"], "cache/tokenizers/cl100k.tiktoken: fetch https://"),
    "no hub": (["data=hub", "data.path=nobody/nothing"], "HF_HUB_OFFLINE keeps from asking the hub"),
    "unknown part": (["data=mix", "data.parts={simpy: 1}"], "data.parts.simpy: there is no data=simpy: choose one of"),
    "no quota": (["data=mix", "data.parts={sympy: 0}"], "data.parts.sympy.quota=0: input should be greater than 0"),
    "of a part": (["data=mix", "data.parts={sympy: {quota: 1, sise: 3}}"], "data.parts.sympy.sise=3: no such key"),
    "part without path": (["data=mix", "data.parts={files: 1}"], "data.parts.files.path is not set"),
    "device": (["device=cuda:9"], "device=cuda:9"),
    "unknown device": (["device=gpu"], "device=gpu: choose auto"),
    "path without files": (["data.path=x"], "no such setting of data=sympy; it belongs to data=files"),
    "in an experiment": (["experiment=smoke", "data.sized=1"], "data.sized: no such setting"),
    "of no experiment": (["experiment.foo=1"], "experiment.foo: no such setting"),
    "nearly a group": (["atention=mla"], "did you mean attention?"),
    "taken folder": (["run_dir=taken"], "run_dir=taken exists already"),
    "no run": (["resume=latest"], "there is no run in"),
    "no folder": (["run_dir=''"], "run_dir="),
    "no name": (["resume="], "resume= names no run"),
    "a flag": (["--foo"], "unrecognized arguments: --foo"),
}


@pytest.mark.parametrize(("overrides", "complaint"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_training_refuses_in_one_line_and_leaves_nothing(workplace, monkeypatch, capsys, overrides, complaint):
    (workplace / "empty.txt").touch()
    (workplace / "binary.txt").write_bytes(bytes(range(256)))
    (workplace / "rows.jsonl").write_text('{"text": "x"}\n{oops\n')
    (workplace / "taken").mkdir()
    (workplace / "taken" / "something").touch()
    before = set(workplace.rglob("*"))
    assert call("train", overrides, monkeypatch) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert complaint in err[-1]
    assert sum(line.startswith("error:") for line in err) == 1 and "Traceback" not in "".join(err)
    assert set(workplace.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["tokenizer=byte", "data=files", "data.path=short.txt"], "give more text"),
        ([*SMOKE, f"sample_prompt={'x' * 64}"], "the prompt has 64 tokens, the context holds 64"),
        ([*SMOKE, "model.d_model=1048576"], "not enough memory: take a smaller model"),
    ],
    ids=["short file", "long preview", "huge model"],
)
def test_what_only_the_shards_can_tell_leaves_them_and_no_run(workplace, monkeypatch, capsys, overrides, complaint):
    (workplace / "short.txt").write_text("short\n" * 20)
    assert call("train", [*overrides, "run_dir=run"], monkeypatch) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert {path.name.split("-")[0] for path in workplace.glob("*/[!.]*")} <= {"files", "synthetic"}
    assert not (workplace / "run").exists()


def test_a_run_of_a_sweep_that_fails_does_not_end_the_sweep(workplace, monkeypatch, capsys):
    sweep = ["-m", *SMOKE, "steps=3", "optim.lr=1e30,1e-3", "clip_norm=0", "most_skipped=1"]
    assert call("train", sweep, monkeypatch) == 2
    out, err = capsys.readouterr()
    assert err.count("error: ") == 1 and "training has diverged" in err
    assert out.count("validation  ") == 1 and len(list((workplace / "runs").glob("*/config.yaml"))) == 2
    assert call("train", [*SMOKE, "steps=1"], monkeypatch) == 0


def test_help_answers_without_loading_torch():
    for program in ("train.py", "sample.py"):
        code = f"import sys, runpy; sys.argv = [{program!r}, '--help']\n"
        code += f"try:\n    runpy.run_path({str(ROOT / program)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        code += "sys.exit('torch' in sys.modules)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        assert "attention" in result.stdout.lower()


def test_as_real_processes(tmp_path):
    """The whole way once, through the shell's eyes: train, then sample into a pipe that closes early."""
    train = subprocess.run(
        [sys.executable, ROOT / "train.py", *SMOKE, "steps=3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert train.returncode == 0, train.stderr
    command = f"{sys.executable} {ROOT / 'sample.py'} 'The ' --max-new-tokens 40 | head -c 5"
    piped = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert piped.stdout.startswith("The ") and "Traceback" not in piped.stderr
