"""Commands that the pages show: each is composed or parsed, and those of train.py run for two steps.

A command is a line of a fenced block of README.md or docs/*.md, as COMMAND takes it: `python` (or `.venv/bin/python`,
`python3`), with train.py, sample.py, compare.py, convert.py or `-m MODULE` behind it, at the start of the line, or
behind `$ `, a pipe or `eval "$(`. What follows a # is a comment; an `error: ` on the next line is the one that the
command ends in.
"""

import functools
import gzip
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import compare
import convert
from ablation.sweep.request import requested
from common.hydra_errors import one_line_hydra_errors
from common.overrides import hydra_arguments, sweep_overrides
from generation.options import parse_arguments
from tests.composition import request_of
from tests.support import ROOT, SMOKE, call, changed
from training.run.composer import asks_hydra_itself
from training.run.config import check_not_of_sweep, pop_command_settings
from training.run.start import resolve_run

FENCED = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(
    r'^(?:\$ |[^#\n]*\| |(?P<eval>eval "\$\())?(?:\S*/)?python3? '
    r'(?P<program>(?:train|sample|compare|convert)\.py|-m [\w.]+)(?P<words>[^\n]*?)(?(eval)\)".*)$'
    r"(?:\n(?P<refusal>error: [^\n]*)$)?",
    re.M,
)
# What a page leaves to its reader, and what stands for it here. All other names are made in `made_place`.
PLACEHOLDERS = {"/new/place": "moved.txt"}
# What needs something that is not here: what that is, and words of the one line by which it is refused. A command with
# one of these overrides must be refused so, and each override must be in a command.
LACKING = {
    "data=hub": ("a network", "HF_HUB_OFFLINE keeps from asking the hub"),
    "experiment=gpt2_124m": ("a network, and a vocabulary that the user fetches", "fetch https://"),
    "kernel.flash=FA3": ("a GPU", "runs on a GPU"),
    "precision=fp8": ("the package torchao", "needs the package torchao"),
    "tokenizer=gpt2": ("a vocabulary that the user fetches", "fetch https://"),
}
SHORT = ("steps=2", "batch_tokens=1024", "eval_every=2", "eval_tokens=1024", "save_every=2", "tune_malloc=false")
SOURCES = ("SympyCorpus", "StdlibCorpus")  # which read a small folder here
SMALL = ("model.n_layers=4", "model.d_model=64", "model.n_heads=4", "model.context_length=64", "micro_batch_size=4")


class Command(NamedTuple):
    program: str  # train.py, sample.py, compare.py, or a module
    words: tuple[str, ...]
    refusal: str | None = None  # the line that it ends in, where the page shows one

    def __str__(self) -> str:
        return " ".join((self.program, *self.words))

    @property
    def arguments(self) -> list[str]:
        """The words, without placeholders."""
        texts = list(self.words)
        for name, value in PLACEHOLDERS.items():
            texts = [text.replace(name, value) for text in texts]
        return texts

    def lacks(self) -> list[str]:
        """The overrides for which something is not here."""
        return [override for override in LACKING if override in self.words and "dry_run=true" not in self.words]


def commands_of(text: str) -> list[Command]:
    found = [match for block in FENCED.findall(text) for match in COMMAND.finditer(block)]
    return [
        Command(
            match["program"].removeprefix("-m "),
            tuple(shlex.split(match["words"], comments=True)),
            match["refusal"],
        )
        for match in found
    ]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page.read_text())))
TRAINING = [command for command in COMMANDS if command.program == "train.py"]
SHOWN = [command for command in TRAINING if asks_hydra_itself([word for word in command.words if word != "-m"])]
REFUSED = [command for command in TRAINING if command.refusal]
RUNS = [command for command in TRAINING if command not in SHOWN + REFUSED]


def of_program(program: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("command", [one for one in COMMANDS if one.program == program], ids=str)


@pytest.fixture(scope="module")
def made_place(tmp_path_factory):
    """A folder with all that the commands name: texts, a table, small runs and a sweep's folder."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("place")
    lines = [f"def name_{i}(x):\n    return x + {i * 7919 % 1000}\n" for i in range(1500)]
    text = "".join(line + "<|endoftext|>\n" * (i % 10 == 9) for i, line in enumerate(lines))
    (folder / "books/old").mkdir(parents=True)
    (folder / "sweeps/NAME").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "moved.txt", "input.txt", "a.py", "books/one.txt", "books/old/two.txt"):
        (folder / name).write_text(text)
    pyarrow.parquet.write_table(pyarrow.table({"body": lines}), folder / "rows.parquet")
    (folder / "texts").mkdir()
    (folder / "texts/a.txt.gz").write_bytes(gzip.compress(text.encode()))
    Dataset.from_dict({"text": lines}).save_to_disk(folder / "saved")
    pairs = ({"question": f"What is name_{i}?", "answer": line} for i, line in enumerate(lines))
    (folder / "pairs.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, pairs))))
    for corpus in SOURCES:
        (folder / corpus).mkdir()
        for i in range(80):
            (folder / corpus / f"file_{i}.py").write_text("".join(lines[10 * i : 10 * i + 40]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = [*SMOKE, "data=files", "data.path=b.txt", *SHORT[:-1]]
        assert call("train", [*run, "run_dir=runs/NAME"], patch) == 0
        assert call("train", [*run, "model.mtp_depth=1", "run_dir=runs/MTP"], patch) == 0
        assert call("train", [*run, "attention=mla", "attention.q_lora_rank=8", "run_dir=runs/MLA"], patch) == 0
        assert call("convert", ["export", "runs/NAME", "--to", "hf", "exported"], patch) == 0
        for seed in (1, 2, 3):
            shutil.copytree("runs/MLA", f"sweeps/base/seed={seed}")
        warm = ["init_from=runs/MLA", "attention=dsa", "attention.indexer.stage=warmup", "run_dir=runs/WARM"]
        assert call("train", [*(one for one in run if not one.startswith("model.")), *warm], patch) == 0
    return folder


@pytest.fixture
def place(made_place, monkeypatch):
    """The folder to read in: a command that is only composed or parsed writes nothing."""

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in made_place.rglob("*") if path.is_file()}

    before = files()
    monkeypatch.chdir(made_place)
    for corpus in SOURCES:
        root = staticmethod(functools.partial(Path, corpus))
        monkeypatch.setattr(f"data.sources.python_source.{corpus}._root", root)
    yield
    assert files() == before


@pytest.fixture
def own_place(place, made_place, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(made_place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python train.py a=b 'c=[d, e]'  # f", "train.py a=b c=[d, e]"),
        ("$ python sample.py 'def ' --stop 'x y'", "sample.py def  --stop x y"),
        ("git diff | python sample.py -", "sample.py -"),
        ('eval "$(python train.py -sc install=bash)"   # it\'s', "train.py -sc install=bash"),
        (".venv/bin/python -m pytest -n auto", "pytest -n auto"),
        ("python my_script.py", None),
        ("see python train.py", None),
        ("error: python train.py", None),
        ("python train.py a=b\nerror: c\nerror: d", "train.py a=b"),
    ],
)
def test_commands_of_a_page_are_found_in_fenced_lines_alone(line, expected):
    found = commands_of(f"{line}\n\n```\n{line}\n```\n")
    assert [str(command) for command in found] == ([] if expected is None else [expected])
    assert not commands_of(f"{line}\n")
    assert [command.refusal for command in found] == [line.split("\n")[1] if "\n" in line else None] * len(found)


def test_commands_of_every_program_are_in_the_pages():
    assert {command.program for command in COMMANDS} >= {"train.py", "sample.py", "compare.py", "pytest"}
    assert SHOWN and REFUSED
    assert len(TRAINING) > 34


@pytest.mark.parametrize("command", RUNS, ids=str)
def test_train_command_of_a_page_composes_and_passes_the_border(place, command):
    sweep = sweep_overrides(command.arguments)
    if sweep is not None:
        assert requested(sweep).runs
        return
    words = hydra_arguments(command.arguments)
    with one_line_hydra_errors(words):
        request = request_of(words)
    given = pop_command_settings(request["tree"])
    check_not_of_sweep(given)
    with ExitStack() as held:
        run, _ = resolve_run(request["tree"], request["typed"], held, given["resume"])
    if LACKING.keys().isdisjoint(command.words):
        assert len(run.data.fingerprint()) > 10  # of what is there to be read


@pytest.mark.parametrize("command", REFUSED, ids=str)
def test_train_command_that_a_page_shows_refused_ends_in_the_line_shown(own_place, monkeypatch, capsys, command):
    assert call("train", command.arguments, monkeypatch) == 2
    assert capsys.readouterr().err.splitlines()[-1] == command.refusal


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_train_command_of_a_page_that_only_shows_something_shows_it(own_place, monkeypatch, capfd, command):
    assert call("train", command.arguments, monkeypatch) == 0
    assert len(capfd.readouterr().out) > 100


@of_program("sample.py")
def test_sample_command_of_a_page_is_parsed(place, monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["sample.py", *command.arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a diff")))
    if "--help" in command.words:
        assert call("sample", command.arguments, monkeypatch) == 0
    else:
        assert parse_arguments("").max_new_tokens > 0


@of_program("compare.py")
def test_compare_command_of_a_page_is_parsed(place, monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["compare.py", *command.arguments])
    assert compare.parse_arguments().x


@of_program("convert.py")
def test_convert_command_of_a_page_is_parsed(place, monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["convert.py", *command.arguments])
    assert convert.parse_arguments().to


@pytest.mark.parametrize("module", sorted({one.program for one in COMMANDS if not one.program.endswith(".py")}))
def test_module_that_a_page_runs_exists(module):
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("override", LACKING)
def test_override_of_the_table_of_what_is_lacking_is_in_a_command(override):
    assert any(override in command.lacks() for command in TRAINING)


def shortened(words: list[str]) -> list[str]:
    """The overrides of a run of two steps on little text, in the place of the command's own."""
    if any(word.startswith("resume=") for word in words):
        return changed(words, "steps=4")  # two are done
    short = [word for word in SHORT if not (word.startswith("steps=") and "minutes=5" in words)]
    short += ["minutes=0.05"] if "minutes=5" in words else []
    if any(word.startswith("init_from=") for word in words):
        return changed(words, *short)
    if "-m" in words:
        varied = any("," in word for word in words if not word.startswith("seed="))
        small = ("data=synthetic", "data.size=200", "tokenizer=byte", "model=tiny")
        return changed(words, *short, *small, "seed=1" if varied else "seed=1,2")
    return changed(words, *short, *SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in RUNS if not command.lacks()], ids=str)
def test_train_command_of_a_page_runs_for_two_steps(own_place, monkeypatch, command):
    assert call("train", shortened(command.arguments), monkeypatch) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in RUNS if command.lacks()], ids=str)
def test_train_command_of_a_page_that_lacks_something_is_refused_for_it(own_place, monkeypatch, capsys, command):
    needs = [LACKING[override] for override in command.lacks()]
    if torch.cuda.is_available() and any("GPU" in what for what, _ in needs):
        pytest.skip("a GPU is here")
    assert call("train", changed(command.arguments, "steps=2"), monkeypatch) == 2
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert any(words in refusal for _, words in needs), refusal
