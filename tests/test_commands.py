"""train.py and sample.py as commands: their output, their files, and the errors of bad arguments."""

import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import version

import pytest
import torch

from common.invocation import command
from generation import decode as generate
from generation.options import parse_arguments
from generation.text_stream import TextStream
from model.kernels.base import forget_logged
from tests.support import QUICK, ROOT, SMOKE, call
from training.metrics_file import read_metrics
from training.run import checkpoint
from training.run import load as trained

HEADROOM = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one trained run of each kind."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("place")
        patch.chdir(folder)
        for attention in ("gqa", "mla"):
            assert call("train", [*QUICK, f"attention={attention}", f"run_dir=runs/{attention}"], patch) == 0
    return folder


def sample(place, monkeypatch, capsys, *arguments: str) -> tuple[str, str]:
    monkeypatch.chdir(place)
    assert call("sample", arguments, monkeypatch) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_train_default_options_prints_losses_speed_sample_and_next_commands(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "sample_every=20", "sample_prompt=The key"], monkeypatch) == 0
    out, err = capsys.readouterr()
    (run,) = (workplace / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-[a-z]+-[a-z]+", run.name)
    assert re.search(r"validation +\d\.\d+ nats per token, \d\.\d+ bits per byte", out)
    assert re.search(r"speed +[\d,]+ training tokens per second", out)
    assert f"runs/{run.name}" in out and "The key" in out.split("validation")[0]
    assert f"next         {command('sample.py', 'your prompt', '--run')}" in out
    assert "4 heads, positions by rope, 119,424 parameters on cpu" in err
    assert "step 30/30" in err and re.search(r"1 micro-batch of 16 x 64, muon_lr up to 0\.02 and lr up to \d", err)
    assert err.count("The key") >= 1  # the preview at step 20


def test_train_two_runs_in_one_second_make_two_folders(workplace, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    monkeypatch.setattr("random.choice", lambda words: words[0])
    for _ in range(2):
        assert call("train", [*QUICK, "steps=1"], monkeypatch) == 0
    assert len(list((workplace / "runs").glob("*/config.yaml"))) == 2


def test_sample_same_seed_writes_same_text_of_newest_run(place, monkeypatch, capsys):
    first, err = sample(place, monkeypatch, capsys, "The query", "--seed", "3", "--max-new-tokens", "30")
    assert first.startswith("The query") and "run runs/mla" in err
    assert sample(place, monkeypatch, capsys, "The query", "--seed", "3", "--max-new-tokens", "30")[0] == first
    assert sample(place, monkeypatch, capsys, "The query", "--seed", "4", "--max-new-tokens", "30")[0] != first
    assert len(first.rstrip("\n")) <= len("The query") + 30


def test_sample_every_execution_of_mla_writes_text_of_uncached_naive_kernel(place, monkeypatch, capsys):
    arguments = ["A head = ", "--run", "runs/mla", "--max-new-tokens", "40", "--top-k", "20"]
    expected, _ = sample(place, monkeypatch, capsys, *arguments, "--no-cache", "--kernel", "naive")
    for execution in ("naive", "expanded", "absorbed"):
        assert sample(place, monkeypatch, capsys, *arguments, "--execution", execution)[0] == expected, execution


def test_sample_compile_without_a_compiler_writes_the_same_text_with_a_warning(place, monkeypatch, capsys):
    arguments = ["The", "--max-new-tokens", "9"]
    expected, _ = sample(place, monkeypatch, capsys, *arguments)
    monkeypatch.setattr("torch.compile", lambda function, **_: lambda *inputs: 1 / 0)
    text, err = sample(place, monkeypatch, capsys, *arguments, "--compile")
    assert text == expected and err.count("--compile failed, running eagerly: division by zero") == 1


def test_sample_stats_prints_throughput_and_cache_bytes(place, monkeypatch, capsys):
    for run, numbers in (("gqa", 2 * 2 * 16), ("mla", 16 + 12 + 1)):
        options = ["--run", f"runs/{run}", "--stats", "--max-new-tokens", "5"]
        _, err = sample(place, monkeypatch, capsys, "The", "--num-samples", "2", *options)
        assert f"cache_bytes_per_token={2 * 4 * numbers}\n" in err
        assert f"cache_bytes={2 * 64 * 2 * 4 * numbers}\n" in err  # of two texts: each with room for 64
        stats = dict(re.findall(r"^(\w+)=(.*)$", err, re.M))
        assert all(float(value) > 0 for value in stats.values()) and len(stats) == 6
        assert float(stats["prefill_tokens_per_second"]) * float(stats["first_token_seconds"]) == pytest.approx(
            2 * 3, rel=0.05
        )


def test_sample_stats_share_is_reading_time_by_the_median_step(place, monkeypatch, capsys):
    """At a made-up bandwidth, and with a clock that goes by a second a token: the third takes five."""
    stated = []
    monkeypatch.setattr("generation.batch_writer.seconds_per_byte", lambda device: stated.append(device) or 1e-6)
    clock = itertools.chain([0, 2, 3, 8, 9, 10], itertools.count(20))
    monkeypatch.setattr("generation.batch_writer.time.perf_counter", lambda: float(next(clock)))
    _, err = sample(place, monkeypatch, capsys, "The", "--run", "runs/gqa", "--stats", "--max-new-tokens", "5")
    stats = dict(re.findall(r"^(\w+)=(.*)$", err, re.M))
    weights = sum(parameter.nbytes for parameter in trained.load_run("runs/gqa")[0].parameters())
    read = int(stats["cache_bytes"]) + weights
    assert stated == [torch.device("cpu")] and float(stats["share_of_bandwidth_floor"]) == round(read * 1e-6, 4)
    assert float(stats["first_token_seconds"]) == 2
    _, err = sample(place, monkeypatch, capsys, "The", "--stats", "--max-new-tokens", "1")
    assert len(stated) == 1 and "share_of_bandwidth_floor=n/a\n" in err and "decode_tokens_per_second=n/a\n" in err


def test_sample_speculate_writes_the_same_texts_and_states_what_was_accepted(place, monkeypatch, capsys):
    """Also in turns, of which some end within what was drafted."""
    common = ["The key the key", "--temperature", "0.1", "--max-new-tokens", "90"]
    batch = [*common, "--num-samples", "3", "--context", "slide", "--repetition-penalty", "1.01", "--stop", "query"]
    plain, drafted = (samples(place, monkeypatch, capsys, *batch, *more) for more in ([], ["--speculate", "lookup"]))
    for one, other in zip(plain, drafted, strict=True):
        assert {key: other[key] for key in other if "second" not in key} == {
            key: one[key] for key in one if "second" not in key
        }

    def talk(*arguments: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n\nThe\n\n"))
        return sample(place, monkeypatch, capsys, "--interactive", *common, "--stop", "he", *arguments)[0]

    assert talk("--speculate", "lookup") == talk()
    _, err = sample(place, monkeypatch, capsys, *common, "--stats", "--speculate", "lookup")
    drafted, accepted = (int(re.search(rf"^{name}_tokens=(\d+)$", err, re.M)[1]) for name in ("drafted", "accepted"))
    assert 0 < accepted <= drafted and f"\naccepted_share={accepted / drafted:.3f}"[:18] in err
    assert float(re.search(r"^tokens_per_step=(.*)$", err, re.M)[1]) > 1


def test_sample_full_context_prints_note(place, monkeypatch, capsys):
    _, err = sample(place, monkeypatch, capsys, "The", "--run", "runs/gqa", "--max-new-tokens", "500", "--seed", "1")
    assert "[the context of 64 tokens is full: --context slide goes on]" in err


def test_sample_multibyte_characters_stream_whole(workplace, monkeypatch, capsys):
    """A byte-level model that has learned nothing but one line of two- to four-byte characters."""
    (workplace / "a.txt").write_text("é漢🙂ñ字🦉\n" * 400)
    options = ["experiment=smoke", "data=files", "data.path=a.txt", "steps=40", "optim.lr=1e-2", "run_dir=run"]
    assert call("train", [*options, "tune_malloc=false"], monkeypatch) == 0
    capsys.readouterr()
    pieces = []
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    assert call("sample", ["é漢", "--run", "run", "--temperature", "0", "--max-new-tokens", "40"], monkeypatch) == 0
    pieces = [piece for piece in pieces if piece]
    assert "🙂ñ字🦉\né漢🙂" in "".join(pieces)
    assert "\ufffd" not in "".join(pieces)  # nor at the end, which falls within a character


def samples(place, monkeypatch, capsys, *arguments: str) -> list[dict]:
    return [json.loads(line) for line in sample(place, monkeypatch, capsys, "--json", *arguments)[0].splitlines()]


def test_sample_num_samples_equals_samples_of_single_seeds(place, monkeypatch, capsys):
    common = ["The", "--max-new-tokens", "30", "--min-p", "0.02", "--repetition-penalty", "1.1"]
    together = samples(place, monkeypatch, capsys, *common, "--seed", "5", "--num-samples", "4")
    alone = [samples(place, monkeypatch, capsys, *common, "--seed", str(seed))[0] for seed in range(5, 9)]
    timeless = [{key: value for key, value in one.items() if "second" not in key} for one in together + alone]
    assert timeless[:4] == timeless[4:] and len({one["text"] for one in together}) > 1
    out, err = sample(place, monkeypatch, capsys, *common, "--seed", "5", "--num-samples", "4")
    assert out == "".join(f"The{one['text']}\n" for one in together)
    assert "[sample 3 of 4, seed 7]" in err


def test_sample_json_reports_text_counts_and_finish_reason(place, monkeypatch, capsys):
    (one,) = samples(place, monkeypatch, capsys, "The key", "--max-new-tokens", "9", "--seed", "3")
    assert (one["prompt"], one["seed"], one["tokens"], one["prompt_tokens"]) == ("The key", 3, 9, 7)
    assert one["finish"] == "length" and one["decode_tokens_per_second"] > 0 and one["prefill_tokens_per_second"] > 0
    (stopped,) = samples(place, monkeypatch, capsys, "The key", "--seed", "3", "--stop", one["text"][4:6])
    assert stopped["finish"] == "stop" and stopped["text"] == one["text"][: one["text"].index(one["text"][4:6])]
    (full,) = samples(place, monkeypatch, capsys, "x" * 60, "--run", "runs/gqa", "--seed", "1")
    assert full["finish"] == "context" and full["tokens"] == 4
    slid = samples(place, monkeypatch, capsys, "x" * 100, "--context", "slide", "--num-samples", "3")
    assert {"length", "end"} >= {one["finish"] for one in slid} and max(one["tokens"] for one in slid) > 64
    assert all((one["finish"] == "end") == (one["tokens"] < 200) for one in slid)


PROMPTS = ["a=b", '"it\'s"', "two\nlines\r\n", "é漢🙂", "--seed", "-", " x ", "$HOME \\n %s {x}", "<|endoftext|>"]
AS_SETTINGS = ["run=runs/gqa", "attention=mla", "steps=5", "model.d_model=64"]
NO_SETTINGS = ["_", "a_b", "seed = 5", "steps = 5", "x=1", "x.y=1", "defaults=1", "run="]


def sources_of(prompt: str, tmp_path, monkeypatch) -> Iterator[list[str]]:
    """The arguments that give a prompt as a word, as a file and on stdin."""
    (tmp_path / "prompt").write_bytes(prompt.encode())
    for arguments in (["--", prompt], ["--prompt-file", str(tmp_path / "prompt")], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
        yield arguments


def parsed(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    return parse_arguments("")


def test_parse_arguments_prompt_from_any_source_is_verbatim(monkeypatch, tmp_path):
    for prompt in PROMPTS:
        for arguments in sources_of(prompt, tmp_path, monkeypatch):
            assert parsed(monkeypatch, *arguments).prompt == prompt, arguments


def test_sample_prompt_from_any_source_reaches_the_model_verbatim(place, monkeypatch, capsys, tmp_path):
    prompt = "two\nlines\r\n é漢🙂"
    for arguments in sources_of(prompt, tmp_path, monkeypatch):
        (one,) = samples(place, monkeypatch, capsys, "--max-new-tokens", "1", *arguments)
        assert (one["prompt"], one["prompt_tokens"]) == (prompt, len(prompt.encode())), arguments


def test_parse_arguments_prompt_flag_or_dashes_make_any_word_the_prompt(monkeypatch):
    for word in ["The key", *AS_SETTINGS]:
        for arguments in (["--prompt", word], [f"--prompt={word}"], ["--", word]):
            assert parsed(monkeypatch, *arguments).prompt == word, arguments


def test_parse_arguments_word_that_is_no_setting_is_the_prompt(monkeypatch):
    for prompt in NO_SETTINGS:
        args = parsed(monkeypatch, prompt, "--max_new_tokens", "1", "--top_k=3")  # as train.py spells its settings
        assert (args.prompt, args.max_new_tokens, args.top_k) == (prompt, 1, 3)


@pytest.mark.parametrize(
    ("arguments", "kernel"),
    [
        (["The key"], "auto"),
        (["The key", "--json"], "naive"),
        (["--interactive"], "online"),
        (["--score", "-"], "auto"),
        (["The", "--attention-map", "map.png"], "naive"),
    ],
    ids=["text", "json", "interactive", "score", "map"],
)
def test_sample_without_stats_announces_no_kernel(place, monkeypatch, capsys, tmp_path, arguments, kernel):
    forget_logged()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The query\n")))
    arguments = [str(tmp_path / word) if word == "map.png" else word for word in arguments]
    _, err = sample(place, monkeypatch, capsys, *arguments, "--kernel", kernel)
    assert "run runs/mla" in err and "\nkernel " not in f"\n{err}"


def test_sample_stop_string_with_a_typed_backslash_n_hints_at_the_line_end(place, monkeypatch, capsys):
    common = ["The", "--max-new-tokens", "2"]
    plain, _ = sample(place, monkeypatch, capsys, *common)
    text, err = sample(place, monkeypatch, capsys, *common, "--stop", r"it's\n", "--stop", "\n\n")
    assert text == plain  # verbatim: source code has such strings, too
    hinted = [line for line in err.splitlines() if "backslash" in line]
    assert hinted == [r"""[--stop 'it'"'"'s\n' is a backslash and an n: a line end is --stop $'it\'s\n']"""]


def test_sample_version_prints_headroom_and_pytorch(monkeypatch, capsys):
    assert call("sample", ["--version"], monkeypatch) == 0
    assert re.fullmatch(r"Headroom \d+\.\d+\.\d+, PyTorch \d+\.\S+\n", capsys.readouterr().out)


@pytest.fixture
def ctrl_c_at(monkeypatch):
    """Call it with n: Ctrl-C comes, once or more often, while the n-th token is being decoded."""

    def arrange(n: int, times: int = 1) -> None:
        fed = []

        def feed(stream, token, feed=TextStream.feed):
            fed.append(token)
            if len(fed) == n:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return feed(stream, token)

        monkeypatch.setattr(TextStream, "feed", feed)

    return arrange


def test_sample_ctrl_c_keeps_the_text_written_so_far(place, monkeypatch, capsys, ctrl_c_at):
    whole, _ = sample(place, monkeypatch, capsys, "The", "--max-new-tokens", "20")
    ctrl_c_at(8)
    assert call("sample", ["The", "--max-new-tokens", "20"], monkeypatch) == 130
    out, err = capsys.readouterr()
    assert out == whole[: 3 + 8] + "\n" and err.endswith("interrupted\n")


def test_sample_second_ctrl_c_ends_before_the_token(place, monkeypatch, capsys, ctrl_c_at):
    whole, _ = sample(place, monkeypatch, capsys, "The", "--max-new-tokens", "20")
    ctrl_c_at(8, times=2)
    assert call("sample", ["The", "--max-new-tokens", "20"], monkeypatch) == 130
    out, err = capsys.readouterr()
    assert out == whole[: 3 + 7] + "\n" and err.endswith("interrupted\n")


def test_sample_json_ctrl_c_prints_objects_of_the_text_so_far(place, monkeypatch, capsys, ctrl_c_at):
    """Of two rows, the second ended before at its stop string."""
    common = ["The", "--json", "--num-samples", "2", "--max-new-tokens", "20", "--seed", "2"]
    whole = samples(place, monkeypatch, capsys, *common)
    stop = whole[1]["text"][:2]
    assert stop not in whole[0]["text"][:8]
    ctrl_c_at(10)  # row 0 has 8 tokens then, row 1 its 2
    assert call("sample", [*common, "--stop", stop], monkeypatch) == 130
    out, err = capsys.readouterr()
    found = [[one[key] for key in ("text", "tokens", "finish")] for one in map(json.loads, out.splitlines())]
    assert found == [[whole[0]["text"][:8], 8, "interrupted"], ["", 2, "stop"]] and err.endswith("interrupted\n")


def test_sample_ctrl_c_at_last_token_finishes_normally(place, monkeypatch, capsys, ctrl_c_at):
    ctrl_c_at(20)
    (one,) = samples(place, monkeypatch, capsys, "The", "--max-new-tokens", "20")
    assert (one["tokens"], one["finish"]) == (20, "length")


def test_sample_stats_logs_kernels_after_the_text(place, monkeypatch, capsys):
    text, _ = sample(place, monkeypatch, capsys, "The", "--max-new-tokens", "9")
    reported = []
    monkeypatch.setattr(sys.stdout, "write", reported.append)
    monkeypatch.setattr(sys.stderr, "write", reported.append)
    forget_logged()
    assert call("sample", ["The", "--stats", "--max-new-tokens", "9"], monkeypatch) == 0
    before, _, after = "".join(reported).partition(text)
    assert "run runs/mla" in before and "\nkernel " in "\n" + after and "\ncache_bytes_per_token=" in after


def test_sample_interactive_turns_stream_text_and_answer_commands(place, monkeypatch, capsys):
    """Through a pipe: each turn's text, and the words to the user on stderr."""

    def talk(*arguments: str) -> tuple[str, str]:
        lines = "The key\n/help\n and\n/nonsense \n//x\n/reset \nThe key\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return sample(place, monkeypatch, capsys, "--interactive", "--max-new-tokens", "6", *arguments)

    out, err = talk("--temperature", "0")
    assert out == talk("--temperature", "0", "--no-cache")[0]
    assert "Ctrl-D" in err and "/nonsense: no such command" in err and "[a new text]" in err
    (one,) = samples(place, monkeypatch, capsys, "The key", "--max-new-tokens", "6", "--temperature", "0")
    assert out.startswith(one["text"]) and out.rstrip("\n").endswith(one["text"].rstrip("\n"))


def test_sample_interactive_seed_temperature_and_quit_take_effect(place, monkeypatch, capsys):
    def talk(lines: str, *arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return sample(place, monkeypatch, capsys, "--interactive", "--max-new-tokens", "6", *arguments)

    out, err = talk("/seed 7\nThe key\n/temperature 0\n/reset\nThe key\n/quit\nnever read\n")
    turns = [samples(place, monkeypatch, capsys, "The key", "--max-new-tokens", "6", *how)[0]["text"].rstrip("\n")
             for how in (["--seed", "7"], ["--temperature", "0"])]  # fmt: skip
    assert out.splitlines() == "\n".join(turns).splitlines()
    assert "[seed 7]\n[temperature 0]\n" in err
    _, err = talk("/seed\n/seed x\n/seed -1\n/temperature nan\n/temperature -2\n/temperature 1 2\n/quit now\n")
    reported = ["/seed takes one number", "/seed x: 'x' is not a whole number of at least 0", "/seed -1: '-1' is not a",
            "/temperature nan: 'nan' is not a number", "/temperature -2: '-2'", "/temperature takes one number",
            "/quit now: no such command"]  # fmt: skip
    assert all(found.startswith(line) for found, line in zip(err.splitlines()[2:], reported, strict=True))


def test_sample_score_of_file_or_stdin_prints_nats_and_bits_per_byte(place, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"The query sees the key.\r\n" * 8)
    out, _ = sample(place, monkeypatch, capsys, "--score", str(tmp_path / "a.txt"))
    found = re.fullmatch(r"(.*) nats per token, (.*) bits per byte, 199 tokens predicted, 199 bytes\n", out)
    assert float(found[1]) == pytest.approx(float(found[2]) * 0.6931, abs=1e-3)
    (one,) = samples(place, monkeypatch, capsys, "--score", str(tmp_path / "a.txt"))
    assert (one["file"], one["tokens"], one["bytes"]) == (str(tmp_path / "a.txt"), 199, 199)
    assert (f"{one['nats_per_token']:.4f}", f"{one['bpb']:.4f}") == found.groups()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "a.txt").read_bytes())))
    assert sample(place, monkeypatch, capsys, "--score", "-")[0] == out


def test_sample_score_tokens_prints_a_line_per_token_and_the_same_summary(place, monkeypatch, capsys, tmp_path):
    text = "The query sees é\n" * 8
    (tmp_path / "a.txt").write_text(text)
    score = ["--score", str(tmp_path / "a.txt")]
    summary, _ = sample(place, monkeypatch, capsys, *score)
    header, *rows, last = sample(place, monkeypatch, capsys, *score, "--tokens")[0].splitlines(keepends=True)
    assert last == summary and "nats" in header and len(rows) == len(text.encode())
    nats = [float(row.split()[1]) for row in rows[1:]]
    assert f"{sum(nats) / len(nats):.3f}" == f"{float(summary.split()[0]):.3f}"
    whole = samples(place, monkeypatch, capsys, *score)
    *tokens, one = samples(place, monkeypatch, capsys, *score, "--tokens")
    assert [one] == whole and b"".join(bytes.fromhex(token["hex"]) for token in tokens) == text.encode()
    assert sum(token["nats"] for token in tokens[1:]) == pytest.approx(one["nats_per_token"] * one["tokens"], rel=1e-12)
    assert [token["number"] for token in tokens] == [*range(1, len(rows) + 1)]
    assert all(math.exp(-token["nats"]) == token["probability"] and len(token["others"]) == 3 for token in tokens[1:])


def test_sample_score_html_writes_a_page_beside_the_same_output(place, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("The <b>query</b>\n")
    score = ["--score", str(tmp_path / "a.txt")]
    summary, _ = sample(place, monkeypatch, capsys, *score)
    for more in ([], ["--tokens"]):
        out, err = sample(place, monkeypatch, capsys, *score, *more, "--html", str(tmp_path / "a.html"))
        assert out.endswith(summary) and err == f"run runs/mla\npage {tmp_path / 'a.html'}\n"
        page = (tmp_path / "a.html").read_text()
        assert summary.strip() in page and "as runs/mla predicts it" in page and "<b>" not in page
        (tmp_path / "a.html").write_text("old")


@pytest.fixture
def nan_after(monkeypatch):
    """Call it with n: of the first text, the logits after n more tokens are NaN."""

    next_logits = generate.next_logits

    def arrange(n: int) -> None:
        calls = []

        def spoilt(model, texts):
            logits = next_logits(model, texts)
            calls.append(1)
            if len(calls) > n:
                logits[0] = math.nan
            return logits

        monkeypatch.setattr(generate, "next_logits", spoilt)

    return arrange


def no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_sample_nan_output_ends_in_one_line_after_the_text(place, monkeypatch, capsys, nan_after):
    common = ["The key", "--max-new-tokens", "9"]
    whole = samples(place, monkeypatch, capsys, *common, "--num-samples", "2")
    nan_after(4)
    assert call("sample", common, monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == f"The key{whole[0]['text'][:4]}\n" and "end of document" not in err
    line = "error: the model's output is not finite after 11 tokens (seed 0): try --checkpoint best, or --precision"
    assert err.splitlines()[-1] == f"{line} fp32"
    nan_after(4)
    assert call("sample", [*common, "--num-samples", "2", "--json", "--temperature", "0.8"], monkeypatch) == 2
    first, second = (json.loads(line, parse_constant=no_json) for line in capsys.readouterr().out.splitlines())
    assert (first["text"], first["tokens"], first["finish"]) == (whole[0]["text"][:4], 4, "not_finite")
    assert (second["text"], second["finish"]) == (whole[1]["text"], "length")


def test_sample_nan_output_at_first_token_or_in_a_conversation_ends_in_one_line(place, monkeypatch, capsys, nan_after):
    nan_after(0)
    monkeypatch.chdir(place)
    assert call("sample", ["The", "--json", "--temperature", "0"], monkeypatch) == 2
    one = json.loads(capsys.readouterr().out, parse_constant=no_json)
    assert (one["text"], one["tokens"], one["prefill_tokens_per_second"]) == ("", 0, None)
    assert call("sample", ["The", "--stats"], monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == "The\n" and "prefill_tokens_per_second=n/a\n" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("The\n/reset\nThe key\n"))
    out, err = sample(place, monkeypatch, capsys, "--interactive")
    assert out == "\n\n\n" and "[the model's output is not finite after 7 tokens: /reset starts again]" in err


def test_sample_score_and_attention_map_of_nan_output_end_in_one_line(place, monkeypatch, capsys, tmp_path):
    def spoilt(*arguments, load_run=trained.load_run, **options):
        model, tokenizer = load_run(*arguments, **options)
        with torch.no_grad():
            model.embedding.weight[ord("y")] = math.nan
        return model, tokenizer

    monkeypatch.chdir(place)
    monkeypatch.setattr(trained, "load_run", spoilt)
    text, picture = tmp_path / "a.txt", tmp_path / "map.png"
    text.write_text("x" * 70 + "yx")
    for json_too in ([], ["--json"]):
        assert call("sample", ["--score", str(text), *json_too], monkeypatch) == 2
        out, err = capsys.readouterr()
        assert "error: the loss of token 2 of the text's 72 is not finite: try" in err  # the head is the embedding
        if json_too:
            found = json.loads(out, parse_constant=no_json)
            assert (found["nats_per_token"], found["bpb"], found["tokens"], found["bytes"]) == (None, None, 71, 71)
        else:
            assert out == ""
    page = ["--html", str(tmp_path / "a.html")]
    assert call("sample", ["--score", str(text), "--tokens", *page], monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 + 72 and out.splitlines()[2].split()[:4] == ["2", "nan", "-", "-"]
    assert err.count("\n") == 2 and "error: the loss of token 2 of the text's 72 is not finite: try" in err
    assert call("sample", ["--score", str(text), "--tokens", "--json", *page], monkeypatch) == 2
    *tokens, one = (json.loads(line, parse_constant=no_json) for line in capsys.readouterr().out.splitlines())
    assert len(tokens) == 72 and tokens[1]["nats"] is tokens[1]["rank"] is one["bpb"] is None
    assert not (tmp_path / "a.html").exists()
    assert call("sample", ["xxy", "--attention-map", str(picture)], monkeypatch) == 2
    assert "the attention of layer 0, head 0 is not finite from token 3 on" in capsys.readouterr().err
    assert not picture.exists()


def test_train_nan_preview_does_not_end_training(workplace, monkeypatch, capsys, nan_after):
    nan_after(3)
    assert (
        call("train", [*QUICK, "steps=4", "sample_every=2", "sample_prompt=The key", "run_dir=run"], monkeypatch) == 0
    )
    out, err = capsys.readouterr()
    reported = "[the model's output is not finite after"
    assert f"{reported} 10 tokens]" in err and f"{reported} 7 tokens]\n\nvalidation" in out


def test_sample_help_states_limits_of_every_number(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert call("sample", ["--help"], monkeypatch) == 0
    numbers = re.findall(r"^  --(\S+) [A-Z]\s+(.*)", capsys.readouterr().out, re.MULTILINE)
    assert len(numbers) == 8 and dict(numbers)["num-samples"].startswith("1 to 1024; ")
    assert [name for name, meaning in numbers if not re.match(r"\d+ (or more|to \d+); ", meaning)] == []


BAD_SAMPLES = {  # by the rule that they break
    "a prompt that does not fit": [
        (
            ["x" * 64],
            "the prompt has 64 tokens, and 63 leave room in the context: shorten it, or read its end with --context",
        ),
        (["a\udcff"], "a prompt a\\udcff is no text in the encoding of this shell, utf-8: write it in utf-8"),
        (
            ["a", "--stop", "\udcff"],
            "--stop \\udcff is no text in the encoding of this shell, utf-8: write it in utf-8",
        ),
    ],
    "words without quotes": [
        (["to", "be"], "unrecognized arguments: be: a prompt of several words goes in quotes"),
    ],
    "a slip of a flag": [
        (["x", "--tempreature", "1"], "arguments: --tempreature 1: did you mean --temperature? ("),
        (["x", "--max_new_tokns", "3"], "--max_new_tokns 3: did you mean --max-new-tokens?"),
    ],
    "a number beyond its limits": [
        (["x", "--temperature", "-1"], "--temperature: '-1'"),
        (["x", "--top-p", "7"], "--top-p: '7'"),
        (["x", "--top-k", "0"], "--top-k: '0'"),
        (["x", "--temperature", "nan"], "--temperature: 'nan'"),
        (["x", "--max-new-tokens", "9" * 400], "--max-new-tokens"),
        (["x", "--temperature", "inf"], "--temperature: 'inf'"),
        (["x", "--min-p", "1.5"], "--min-p: '1.5'"),
        (["x", "--repetition-penalty", "0.5"], "--repetition-penalty: '0.5'"),
        (["x", "--num-samples", "0"], "--num-samples: '0'"),
        (["x", "--seed", "-1"], "--seed: '-1'"),
        (
            ["x", "--seed", str(2**63 - 1), "--num-samples", "2"],
            f"--seed {2**63 - 1} with --num-samples 2: the seeds would go beyond {2**63 - 1}",
        ),
    ],
    "no stop string": [
        (["x", "--stop", ""], "--stop: an empty string"),
    ],
    "a run that is not there": [
        (["x", "--run", "runs/none"], "runs/none is not a run: there is no such folder\n"),
        (["x", "--run", "runs/gqaa"], "runs/gqaa is not a run: there is no such folder; did you mean runs/gqa?"),
        (["x", "--run", "gqa"], "gqa is not a run: there is no such folder; did you mean runs/gqa?"),
        (["x", "--run", "rnus/gqa"], "there is no such folder; did you mean runs/gqa?"),
        (["x", "--run", ""], "--run: an empty name: give a run's folder, or latest"),
        (["x", "--run", "x.txt"], "x.txt is a file: give the folder of a run\n"),
        (
            ["x", "--run", "runs/gqa/config.yaml"],
            "runs/gqa/config.yaml is a file: give the folder of a run, runs/gqa\n",
        ),
    ],
    "an execution of another attention": [
        (["x", "--run", "runs/gqa", "--execution", "absorbed"], "runs in one way only"),
    ],
    "a device that is not there": [
        (["x", "--device", "meta"], "device=meta"),
        (["x", "--device", "cuda:9"], "device=cuda:9"),
        (["x", "--device", "toaster"], "device=toaster"),
    ],
    "a choice among one": [
        (["x", "--temperature", "0", "--top-k", "5"], "--temperature 0 with --top-k"),
        (["x", "--temperature", "0", "--top-p", "0.5"], "--temperature 0 with --top-p"),
        (["x", "--temperature", "0", "--min-p", "0.5"], "--temperature 0 with --min-p"),
        (["x", "--temperature", "0", "--num-samples", "2"], "all would be the same text"),
    ],
    "two prompts": [
        (["x", "--prompt-file", "empty.txt"], "--prompt-file with a prompt"),
        (["x", "--prompt", "y"], "--prompt with a prompt: there is one prompt; leave one"),
        (["--prompt", "y", "--prompt-file", "empty.txt"], "--prompt-file with a prompt"),
    ],
    "a setting of sample.py": [
        (["temperature=0.5"], "temperature=0.5: settings are flags here: write --temperature 0.5; a prompt"),
        (["x", "max_new_tokens=3"], "are flags here: write --max-new-tokens 3; a prompt"),
        (["run=it's"], "run=it's: settings are flags here: write --run 'it'\"'\"'s'"),
        (["--interactive", "run_dir=runs/gqa"], "are flags here: write --run runs/gqa; a"),
        (["resume=latest"], "resume=latest: settings are flags here: write --run latest; a prompt"),
        (["x", "--stats", "json=true"], "json=true: settings are flags here: write --json; a"),
    ],
    "a setting of train.py": [
        (["attention=mla"], "attention=mla: attention is a setting of train.py, not of sample.py"),
        (["x", "steps=5"], "steps=5: steps is a setting of train.py, not of sample.py, which"),
        (["--interactive", "model.d_model=64"], "takes a run as it was trained: leave it out; a pr"),
        (["++optim.lr=1e-3"], "++optim.lr=1e-3: optim.lr is a setting of train.py, not of sample.py"),
    ],
    "a text that cannot be read": [
        (["--prompt-file", "none.txt"], "none.txt cannot be read: No such file"),
        (["--prompt-file", "binary.txt"], "binary.txt is not UTF-8 text: byte 2"),
        (["--score", "none.txt"], "none.txt cannot be read: No such file"),
        (["--score", "binary.txt"], "binary.txt is not UTF-8 text"),
    ],
    "a conversation with what it excludes": [
        (["--interactive", "--json"], "--interactive with --json: a JSON object holds a finished text"),
        (["--interactive", "--stats"], "--interactive with --stats: speeds are measured"),
        (["--interactive", "--num-samples", "2"], "--interactive with --num-samples"),
        (["--interactive", "--prompt-file", "x"], "--interactive with --prompt-file"),
        (["--interactive", "-"], "--interactive with -: stdin"),
    ],
    "a score with what it excludes": [
        (["x", "--score", "empty.txt"], "--score with a prompt: a text is read, none is written"),
        (["--score", "empty.txt", "--top-k", "3"], "--score with --top-k"),
        (["--score", "empty.txt", "--interactive"], "--score with --interactive"),
        (["--score", "empty.txt", "--attention-map", "a.png"], "--score with --attention-map"),
    ],
    "a text that leaves nothing to score": [
        (["--score", "empty.txt"], "--score empty.txt is empty, which leaves nothing to predict"),
        (["--score", "x.txt", "--tokens"], "a single token, which leaves nothing to predict"),
    ],
    "a score's flag without a score": [
        (["x", "--tokens"], "--tokens without --score: it prints how each token of a text is"),
        (["x", "--html", "a.html"], "--html without --score: it shows how a text is predicted; add"),
    ],
    "a page that cannot be written": [
        (["--score", "x.txt", "--html", "a.txt"], "--html a.txt: choose a name that ends in .html\n"),
        (["--score", "x.txt", "--html", "none/a.html"], "none/a.html cannot be written: there is no folder"),
        (["--score", "x.html", "--html", "./x.html"], "--html x.html is the text itself: give the page"),
        (["--score", "long.txt", "--html", "a.html"], "at most 262,144 bytes, long.txt has 262,145: score a"),
    ],
    "a map of too few or too many tokens": [
        (["--attention-map", "a.png"], "a prompt of 2 to 64 tokens, this one has 0: give a longer one"),
        (["x" * 65, "--attention-map", "a.png"], "2 to 64 tokens, this one has 65: give a shorter one"),
    ],
    "a map that cannot be written": [
        (["xy", "--attention-map", "a.bmp"], "a.bmp: choose a name that ends in one of .pdf, .png"),
        (["xy", "--attention-map", "none/a.png"], "none/a.png cannot be written: there is no folder none"),
        (["xy", "--attention-map", "folder.png"], "folder.png cannot be written: it is a folder"),
    ],
    "a map with what it excludes": [
        (["xy", "--attention-map", "a.png", "--top-k", "3"], "--attention-map with --top-k"),
    ],
}


@pytest.mark.parametrize("rule", BAD_SAMPLES)
def test_sample_bad_arguments_exit_with_one_line(place, monkeypatch, capsys, rule):
    monkeypatch.chdir(place)
    (place / "empty.txt").touch()
    (place / "folder.png").mkdir(exist_ok=True)
    (place / "binary.txt").write_bytes(b"a\n\xff")
    (place / "long.txt").write_bytes(b"x" * (2**18 + 1))
    for name in ("x.txt", "x.html"):
        (place / name).write_text("x")
    for arguments, complaint in BAD_SAMPLES[rule]:
        assert call("sample", arguments, monkeypatch) == 2, arguments
        out, err = capsys.readouterr()
        assert complaint in err and err.count("\n") == 1 and out == ""
        assert not (place / "a.png").exists() and not (place / "a.html").exists()


@pytest.fixture
def copied(place, tmp_path, monkeypatch):
    """A copy of a run, to be damaged."""
    monkeypatch.chdir(place)
    return shutil.copytree(place / "runs/mla", tmp_path / "mla")


def test_sample_damaged_best_checkpoint_names_ways_out_that_work(copied, monkeypatch, capsys):
    arguments = ["x", "--max-new-tokens", "1", "--run", str(copied), "--checkpoint"]
    best = checkpoint.best(copied).path
    other = max(path for path in (copied / "checkpoints").iterdir() if path != best)
    (best / "model.safetensors").write_bytes(b"damaged")
    assert call("sample", [*arguments, "best"], monkeypatch) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {best}/model.safetensors is damaged: ") and err.count("\n") == 1
    assert f": --checkpoint latest takes {other.name}, which is whole; or move {best} away, to take the best of" in err
    assert call("sample", [*arguments, "latest"], monkeypatch) == 0
    shutil.move(best, copied / "aside")
    assert call("sample", [*arguments, "best"], monkeypatch) == 0
    for path in (copied / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"damaged")
    capsys.readouterr()
    assert call("sample", [*arguments, "best"], monkeypatch) == 2
    assert "and no other checkpoint is whole: bring one back, or start a new run" in capsys.readouterr().err


def test_sample_damaged_tokenizer_names_the_file_and_the_copy_that_mends_it(copied, place, monkeypatch, capsys):
    arguments = ["x", "--max-new-tokens", "1", "--run", str(copied)]
    (copied / "tokenizer.json").write_text("{")
    assert call("sample", arguments, monkeypatch) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: the tokenizer {copied}/tokenizer.json is damaged: ") and err.count("\n") == 1
    assert err.endswith("bring the run's own back; the run's prepared text, in its cache_dir, has a copy of it\n")
    (copy,) = place.glob("cache/*/tokenizer.json")
    shutil.copy(copy, copied)
    assert call("sample", arguments, monkeypatch) == 0


BAD_RUNS = {  # a line of each place that refuses; tests of that place have the rest
    "attention": (["attention=gqaa"], "attention=gqaa: choose one of dsa, gqa, mha, mla, mqa"),
    "position": (["position=absolute"], "position=absolute: choose one of alibi, learned, none, rope, sinusoidal"),
    "a number beyond its limits": (["threads=0"], "threads=0: give at least 1 and at most 1024"),
    "nearly the newest run": (["init_from=last"], "there is no such folder; did you mean init_from=latest?"),
    "of another choice": (
        ["attention=mla", "attention.n_kv_heads=2"],
        "of attention=mla; it belongs to attention=gqa or mha or mqa",
    ),
    "nearly, in an experiment": (["experiment=smoke", "data.sise=1"], "of data=synthetic; did you mean size?"),
    "nearly, in a sweep": (["-m", "attention=gqa,mla", "attention.n_kv_head=2"], "did you mean n_kv_heads?"),
    "nearly, added": (["+model.d_modl=64"], "model.d_modl=64: no such key; did you mean d_model?"),
    "nearly, taken away": (["~optim.lrr"], "optim.lrr: no such setting of optim=muon; did you mean lr?"),
    "nearly an experiment": (["experimnt=smoke"], "experimnt: no such setting; did you mean experiment?"),
    "in an experiment": (["experiment=smoke", "data.sized=1"], "data.sized: no such setting"),
    "type": (["steps=abc"], "steps=abc"),
    "path as it is typed": (["data.path=<a=b> [1].txt", "data=files"], "data.path='<a=b> [1].txt' matches no file"),
    "empty file": (["data=files", "data.path=empty.txt"], "empty.txt is empty"),
    "no vocabulary": (["tokenizer=cl100k"], "cache/tokenizers/cl100k.tiktoken: fetch https://"),
    "unknown part": (["data=mix", "data.parts={simpy: 1}"], "data.parts.simpy: there is no data=simpy: choose one of"),
    "unknown device": (["device=gpu"], "device=gpu: choose auto"),
    "device": (["device=cuda:9"], "device=cuda:9"),
    "taken folder": (["run_dir=taken"], "run_dir=taken exists already: choose another"),
    "folder in a file": (["run_dir=empty.txt/run"], "run_dir=empty.txt/run cannot be made: Not a directory: give"),
    "a file for data": (
        ["data=a.txt"],
        "data=a.txt: did you mean data=files data.path=a.txt? Or choose one of copy, files, ",
    ),
    "numbered model": (["model=5"], "model=5: choose one of classic_gpt, gpt2, gpt2_medium, mini, small, tiny"),
    "no attention": (["attention=null"], "attention=null: choose one of dsa, gqa, mha, mla, mqa"),
    "folder of a project": (["run_dir=project"], "run_dir=project exists already: choose another"),
    "folder that is a file": (["run_dir=empty.txt"], "run_dir=empty.txt exists already: choose another"),
    "no folder": (["run_dir=''"], "run_dir="),
    "a folder": (["data=files", "data.path=taken"], "data.path='taken' is a folder: write taken/*"),
    "no run": (["resume=latest"], "there is no run in"),
    "no such run, and what may not change": (
        ["experiment=smoke", "resume=none"],
        "none is not a run: there is no such folder",
    ),
    "a choice twice": (
        ["attention=mha", "attention=mla"],
        "attention=mha and attention=mla give attention twice: leave",
    ),
    "a choice twice in a sweep": (["-m", "optim=adamw,muon", "optim=muon"], "optim=adamw,muon and optim=muon give"),
    "two beginnings": (["init_from=a", "resume=b"], "resume=b with init_from: a run that goes on has weights already"),
    "a flag": (["--foo"], "unrecognized arguments: --foo"),
    "a flag without its value": (["--cfg"], "--cfg/-c: expected one argument"),
    "a setting and its value as a flag": (["--steps=100"], "--steps=100: settings have no dashes: write steps=100"),
    "added by its old name": (["+checkpoint_activations=true"], "called activation_checkpointing now: write"),
    "the newest run by another name": (["resume=last"], "there is no such folder; did you mean resume=latest?"),
    "no evaluation and less": (["eval_every=-1"], "eval_every=-1: give at least 0"),
}


@pytest.mark.parametrize(("overrides", "complaint"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_train_bad_overrides_exit_with_one_line_and_no_files(workplace, monkeypatch, capsys, overrides, complaint):
    (workplace / "empty.txt").touch()
    (workplace / "taken").mkdir()
    (workplace / "taken" / "something").touch()
    (workplace / "project").mkdir()
    (workplace / "project" / "environment.yaml").touch()  # as a run has one, too
    before = set(workplace.rglob("*"))
    assert call("train", overrides, monkeypatch) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert complaint in err[-1]
    assert sum(line.startswith("error:") for line in err) == 1 and "Traceback" not in "".join(err)
    assert set(workplace.rglob("*")) == before


def test_train_experiment_with_old_setting_name_names_the_new_one(workplace, monkeypatch, capsys):
    (workplace / "experiment").mkdir()
    (workplace / "experiment/ours.yaml").write_text("# @package _global_\noptim: {logical_blocks: false}\n")
    assert call("train", ["experiment=ours", f"hydra.searchpath=[file://{workplace}]"], monkeypatch) == 2
    assert re.fullmatch(r"error: \S+ is called (\S+) now: write \1=\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("typed", "end"),
    [
        (
            "experiment=study/diagonal tokenizer=byte",
            " (experiment=study/diagonal sets tokenizer.vocab_size)",
        ),
        ("experiment=study/diagonal model=gpt2", " (experiment=study/diagonal sets model.d_model)"),
        ("experiment=study/diagonal model=gpt2 model.d_model=65", "choose n_heads from 1, 5, 13, 65"),
        (
            "experiment=study/sparse_recall attention=gqa",
            " (experiment=study/sparse_recall sets attention.q_lora_rank)",
        ),
    ],
)
def test_train_setting_of_an_experiment_that_does_not_fit_is_blamed_on_it(workplace, monkeypatch, capsys, typed, end):
    for words in (["-m", *typed.split()], [*typed.split(), "hypothesis=null"]):
        assert call("train", words, monkeypatch) == 2
        assert capsys.readouterr().err.endswith(f"{end}\n")


def test_train_setting_typed_where_it_exists_is_not_blamed_on_the_experiment(workplace, monkeypatch, capsys):
    assert call("train", ["-m", "experiment=study/diagonal", "if:model.d_model=65"], monkeypatch) == 2
    assert capsys.readouterr().err.endswith("choose n_heads from 1, 5, 13, 65\n")


def test_train_experiment_of_another_folder_is_not_blamed_for_a_misspelt_setting(workplace, monkeypatch, capsys):
    (workplace / "experiment").mkdir()
    (workplace / "experiment/ours.yaml").write_text("# @package _global_\nsteps: 3\n")
    typed = ["experiment=ours", f"hydra.searchpath=[file://{workplace}]", "setps=4"]
    assert call("train", typed, monkeypatch) == 2
    assert capsys.readouterr().err == "error: setps: no such setting; did you mean steps?\n"


def test_train_version_prints_headroom_and_pytorch(workplace, monkeypatch, capsys):
    assert call("train", ["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"Headroom {HEADROOM}, PyTorch {version('torch')}\n"


def test_train_threads_are_set_and_printed(workplace, monkeypatch, capsys):
    before = torch.get_num_threads()
    try:
        assert call("train", [*QUICK, "steps=1", "threads=2", "run_dir=run"], monkeypatch) == 0
        assert "parameters on cpu, 2 threads\n" in capsys.readouterr().err
        assert call("train", ["resume=run", "steps=2", "threads=1"], monkeypatch) == 0
        assert "parameters on cpu, 1 thread\n" in capsys.readouterr().err
    finally:
        torch.set_num_threads(before)


def test_train_more_threads_than_cpus_warns(workplace, monkeypatch, capsys):
    before = torch.get_num_threads()
    try:
        assert call("train", [*QUICK, "steps=1", f"threads={(os.cpu_count() or 1) + 1}"], monkeypatch) == 0
        assert "is more than the CPUs there are: with threads=" in capsys.readouterr().err
    finally:
        torch.set_num_threads(before)


def test_sample_run_latest_is_the_newest_run(workplace, monkeypatch, capsys):
    assert call("train", [*QUICK, "steps=1"], monkeypatch) == 0
    assert call("sample", ["--run", "latest", "--seed", "1", "the"], monkeypatch) == 0
    named = capsys.readouterr().out
    assert call("sample", ["--seed", "1", "the"], monkeypatch) == 0
    assert named.endswith(capsys.readouterr().out)


def test_train_eval_every_0_evaluates_after_the_last_step(workplace, monkeypatch):
    assert call("train", [*QUICK, "steps=1e1", "eval_every=0", "run_dir=run"], monkeypatch) == 0
    rows = read_metrics(workplace / "run/metrics.jsonl")
    assert [row["step"] for row in rows if "val_loss" in row] == [10]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["tokenizer=byte", "data=files", "data.path=short.txt"],
            "bytes, one window of model.context_length=256 takes 257 tokens: give more text, or a shorter",
        ),
        ([*SMOKE, f"sample_prompt={'x' * 64}"], "the prompt has 64 tokens, and 63 leave room in the context"),
        ([*SMOKE, "model.d_model=1048576"], "not enough memory: take a smaller model"),
    ],
    ids=["short file", "long preview", "huge model"],
)
def test_train_error_after_preparing_leaves_shards_and_no_run(workplace, monkeypatch, capsys, overrides, complaint):
    (workplace / "short.txt").write_text("short\n" * 20)
    assert call("train", [*overrides, "run_dir=run"], monkeypatch) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert {path.name.split("-")[0] for path in workplace.glob("*/[!.]*")} <= {"files", "synthetic"}
    assert not (workplace / "run").exists()


@pytest.mark.parametrize(
    "command",
    [
        "train.py --help",
        "sample.py --help",
        "compare.py --help",
        "compare.py --x=miles",
        "sample.py --version",
        "sample.py --interactive --json",
        "sample.py --score no.txt",
    ],
)
def test_commands_help_and_bad_arguments_import_no_torch(command):
    code = f"import sys, runpy; sys.argv = {command.split()!r}\n"
    code += f"try:\n    runpy.run_path({str(ROOT / command.split()[0])!r}, run_name='__main__')\n"
    code += "except SystemExit: pass\nsys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    if "--help" in command:
        assert "attention" in result.stdout.lower()
    elif "--version" in command:
        assert result.stdout.startswith("Headroom ")
    else:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


HEAVY = {"datasets", "matplotlib", "pyarrow", "sympy", "tokenizers", "torch._dynamo", "torch._inductor", "wandb"}


def loaded_by(program: str, *arguments: str, until: str) -> list[str]:
    """What of HEAVY a process of its own has loaded when it comes to the method `until`, where it ends."""
    module = until.rsplit(".", 2)[0]
    code = f"""
import runpy, sys
import {module}

def stop(*_):
    print("loaded:", *({HEAVY!r} & sys.modules.keys()), file=sys.stderr)
    sys.exit(7)

{until} = stop
sys.argv = {[program, *arguments]!r}
runpy.run_path({str(ROOT / program)!r}, run_name="__main__")
"""
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=here)
    assert result.returncode == 7, result.stderr
    return re.search(r"^loaded:(.*)$", result.stderr, re.M)[1].split()


@pytest.mark.parametrize("optim", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_train_cached_corpus_imports_no_heavy_package_before_first_save(workplace, monkeypatch, optim):
    """Each of these costs a part of a second or more, which a user would wait for at every start."""
    settings = [*QUICK, "tokenizer=bpe", "tokenizer.vocab_size=300", f"optim={optim}", "save_every=1"]
    assert call("train", [*settings, "steps=1"], monkeypatch) == 0  # fills the cache
    assert loaded_by("train.py", *settings, until="training.metrics_file.MetricsFile.sync") == []  # its first save


def test_sample_first_token_imports_no_heavy_package(place, monkeypatch):
    monkeypatch.chdir(place)
    assert loaded_by("sample.py", "The ", "--run", "runs/mla", until="generation.text_stream.TextStream.feed") == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_that_installing_takes_minutes_before_it_installs(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    for folder in (".venv", "bin"):
        (tmp_path / folder).mkdir()
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\necho "python $*"\n')
    python.chmod(0o755)
    made = ["make", "--silent", "install", f"PYTHON={python}", "BIN=bin"]
    first, again = (subprocess.run(made, cwd=tmp_path, capture_output=True, text=True).stdout for _ in range(2))
    said, venv, pip = first.splitlines()
    assert "takes minutes" in said and venv == "python -m venv .venv" and pip.startswith("python -m pip install")
    assert again == ""


@pytest.mark.slow  # tests/common/test_streams.py has each case of it in small processes
def test_commands_as_processes_survive_closed_streams(tmp_path):
    """The whole way once, through the shell's eyes: train where nobody listens, files being opened while the streams
    are closed, then sample into a pipe that closes early."""
    train = f"{sys.executable} {ROOT / 'train.py'} {' '.join(SMOKE)} steps=3 run_dir=runs/run <&- >&- 2>&-"
    assert subprocess.run(train, shell=True, cwd=tmp_path).returncode == 0
    assert [row["step"] for row in read_metrics(tmp_path / "runs/run/metrics.jsonl")] == [1, 2, 3]
    command = f"{sys.executable} {ROOT / 'sample.py'} 'The ' --max-new-tokens 40 | head -c 5"
    piped = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert piped.stdout.startswith("The ") and "Traceback" not in piped.stderr
