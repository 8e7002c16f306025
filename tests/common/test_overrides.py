"""What is typed after train.py: any text as a value, and what is to be typed instead of what cannot be read."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from common import invocation
from common.errors import UserError
from common.invocation import command, interpreter, quoted
from common.overrides import format_override, hydra_arguments
from tests.support import QUICK, ROOT, SMOKE, call
from training.run.folder import resume_command


def value_of(word: str):
    """What a setting is after Hydra, and OmegaConf, have read it."""
    (read,) = hydra_arguments([word])
    return OmegaConf.create({"key": OverridesParser.create().parse_override(read).value()}).key


VERBATIM = ["my books/a.txt", "~/a b.txt", "~", "Ärger.txt", "書.txt", "e\u0301.txt", "🙂", "it's.txt", "a#b", "a$b"]
VERBATIM += ["a{b", "a}b", "a(b", "(a)", "f(x)", "a[b", "books/[v1].txt", "[v1]", "[v1].txt", "{a}", "a=b", "a!b"]
VERBATIM += ["a;b", "a|b", "a&b", "<b>", "`a`", "^", '"a', "'a", 'a"b"', "a\nb", "a\tb", "007", "1e3", "12", "true"]
VERBATIM += ["<|endoftext|>", "</s>", "###", "it's <x>", 'say "<x>"', "\\n\\n", "books/*.txt"]
VERBATIM += ["a\\b", "~\\", '~\\"', "a${b", "*.txt", "a:b", "a@b", "a\u00a0b", "a\x1bb"]
SUGGESTED = ["data.path=a,b", "data.path=choice(a,b)", "data.parts={ä}", "attention.pattern=[~,~]"]
NAMES = ["a run", "a,b", "nuLL", "~", "it's", '"q"', "a\\", "$x", "[v1]", "a(b)", "Ä", " a ", "7", "a\x1b\n'b"]
NAMES += ["b\udcff", "${x}", "a\\${x}", "$${oc.env:HOME}", '"${a${b}\\', "C:\\", 'a\\"b', "null", "1e3"]


TYPED = {
    "steps=3": 3,
    "seed = 3": 3,
    "optim.lr=1e-3": 1e-3,
    "compile=true": True,
    "resume=null": None,
    "data.path='a, b'": "a, b",
    'data.path="it\'s"': "it's",
    "attention.pattern=[local,global]": ["local", "global"],
    "data.parts={sympy: 2, texts: {path: '*.txt'}}": {"sympy": 2, "texts": {"path": "*.txt"}},
    "run_dir=~/my runs": str(Path("~/my runs").expanduser()),
    "steps=3;": "3;",
    "steps=1e3": 1000,
    "+seed=1.5e3": 1500,
    "steps=2.0": 2,
    "steps=1.5": 1.5,
    "optim.eps=1e-8": 1e-8,
    "logger.project='1e3,b'": "1e3,b",
    "steps=1e999": float("inf"),
}


@pytest.mark.parametrize("key", ["data.path", "data.document"])
def test_hydra_arguments_text_of_any_characters_is_taken_verbatim(key):
    for value in VERBATIM:
        assert value_of(f"{key}={value}") == value


def test_hydra_arguments_other_value_keeps_its_type():
    for word, value in TYPED.items():
        assert value_of(word) == value, word


def test_hydra_arguments_sweep_and_flags_are_quoted_and_moved_last():
    assert hydra_arguments(["-m", "data.path=~/a,Ä b", "attention=mha,mla"]) == [
        'data.path="~/a","Ä b"',
        "attention=mha,mla",
        "-m",
    ]
    assert hydra_arguments(["--multi", "seed=1,2"]) == ["seed=1,2", "--multi"]
    assert hydra_arguments(["--cfg", "job", "steps=3"]) == ["steps=3", "--cfg", "job"]
    assert hydra_arguments(["+attention=mla"]) == ["attention=mla"]
    assert hydra_arguments(["-m", "steps=1e3,2e3"]) == ["steps=1000,2000", "-m"]
    assert hydra_arguments(["--help"]) == ["--help"]
    assert hydra_arguments(["-cn", "train", "--info"]) == ["-cn", "train", "--info"]


REFUSED = {
    "": "'' is no setting: write key=value, as in steps=300",
    "foo": "'foo' is no setting: write key=value",
    "+": "'+' is no setting",
    "~": "'~' is no setting",
    "=5": "'=5' is no setting",
    "stéps=3": "stéps: no such setting; did you mean steps?",
    "~stéps": "stéps: no such setting; did you mean steps?",
    "~attention": "~attention: a run needs its attention: choose another as attention=",
    "attention=mha,mla": "attention=mha,mla is several values: add -m, for a run of each",
    "+data.path=\udcff": "+data.path=\\udcff is no text in the encoding of this shell, utf-8: rename the file, or",
    "sample_prompt=\udcff": "sample_prompt=\\udcff is no text in the encoding of this shell, utf-8: write it in utf-8",
    "data.path=\udcff": "data.path=\\udcff is no text in the encoding of this shell, utf-8: rename the file, or",
}


FLAGS = {
    "--steps 100": "--steps: settings have no dashes: write steps=100",
    "--attention mla": "--attention: settings have no dashes: write attention=mla",
    "--batch-tokens 64 seed=1": "--batch-tokens: settings have no dashes: write batch_tokens=64",
    "--lr 0.1": "--lr: settings have no dashes: write optim.lr=0.1",
    "--compile seed=1": "--compile: settings have no dashes: write compile=...",
    "steps=3 optim=adamw ++steps=5": "steps=3 and ++steps=5 give steps twice: leave one",
}


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as refused:
        hydra_arguments(words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_hydra_arguments_several_values_are_offered_as_a_text_where_they_can_be_one():
    assert refusal("hypothesis=a,b").endswith("""a sweep has one, or write 'hypothesis="a,b"' for one text""")
    assert refusal("sample_prompt=a,b").endswith("""run of each, or write 'sample_prompt="a,b"' for one text""")
    assert refusal("match=cache,params").endswith("of a sweep: write match=[cache,params], and add -m")
    assert refusal("minutes=1,2").endswith("minutes=1,2 is several values: a sweep has one")
    for typed in ("seed=1,2", "mlp.bias=true,False", "model.norm=rms,layer", "optim.lr=1e-3,.1", "seed=range(1,3)"):
        assert refusal(typed).endswith("add -m, for a run of each")


def test_hydra_arguments_unreadable_word_is_refused_in_one_line():
    for word, line in REFUSED.items():
        assert refusal(word).startswith(line)


def test_hydra_arguments_setting_as_a_flag_or_given_twice_says_what_to_type():
    for words, line in FLAGS.items():
        assert refusal(*words.split()).startswith(line)


def test_hydra_arguments_suggested_word_gives_the_text():
    for word in SUGGESTED:
        key, _, value = word.partition("=")
        *_, suggested = [part for part in shlex.split(refusal(word)) if part.startswith(f'{key}="')]
        assert value_of(suggested) == value


def test_resume_command_of_any_run_name_survives_the_shell():
    for name in NAMES:
        printed = resume_command(Path(name))
        assert printed.isprintable()
        words = subprocess.run(["bash", "-c", f"printf '%s\\0' {printed}"], capture_output=True).stdout.split(b"\0")
        word = words[2].decode(errors="surrogateescape")
        assert words[1].decode() == invocation.shortest(str(ROOT / "train.py"))
        if "\udcff" in name:  # which Hydra cannot be given
            assert word == format_override("resume", name)
        else:
            assert Path(value_of(word)) == Path(name)


def test_format_override_of_any_value_is_read_back():
    for key in ("data.path", "data.parts.a.corpus.path", "logger.project"):
        for value in (name for name in NAMES if "\udcff" not in name):
            assert value_of(format_override(key, value)) == value, key


def test_train_with_a_strange_run_name_makes_and_resumes_it(workplace, monkeypatch, capsys):
    name = "my [v1] ~ü's\x1b run"
    assert call("train", [*QUICK, "steps=1", f"run_dir={name}"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "run          my [v1] ~ü's\\x1b run  (loss.png" in out
    (line,) = [line for line in out.splitlines() if "resume=" in line]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True).stdout.split("\0")
    assert call("train", words[2:-1], monkeypatch) == 0  # steps=2
    assert len((workplace / name / "metrics.jsonl").read_text().splitlines()) == 2
    assert call("train", [*SMOKE, f"run_dir={name}"], monkeypatch) == 2
    again = f"choose another, or continue it with {resume_command(Path(name))}\n"
    assert again in capsys.readouterr().err


def test_command_in_any_environment_names_the_running_python(tmp_path, monkeypatch):
    base, venv = tmp_path / "base", tmp_path / ".venv/bin"
    for folder in (base, venv):
        folder.mkdir(parents=True)
    (base / "python3.11").touch(mode=0o755)
    for link in (base / "python", base / "python3", venv / "python", venv / "python3"):
        link.symlink_to(base / "python3.11")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(invocation, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "executable", str(venv / "python"))
    monkeypatch.setenv("PATH", str(base))  # as without the environment: the same binary, and other packages
    assert command("train.py", "resume=a b") == ".venv/bin/python train.py 'resume=a b'"
    assert command("-m training.run.replay", "x") == ".venv/bin/python -m training.run.replay x"
    monkeypatch.setenv("PATH", f"{venv}:{base}")
    assert command("train.py") == "python train.py"
    monkeypatch.setattr(sys, "executable", str(base / "python3.11"))
    monkeypatch.setenv("PATH", str(base))
    assert interpreter() == "python"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(base)
    assert command("train.py") == "./python3.11 ../train.py"
    assert command("-m training.run.replay") == f"PYTHONPATH={tmp_path} ./python3.11 -m training.run.replay"
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert command("train.py") == f"{base}/python3.11 {tmp_path}/train.py"


def test_quoted_word_of_any_characters_survives_the_shell():
    for word in ("a b", "it's", "\x1b[1m'\\x", "a\nb", "\u202eé", "b\udcff"):
        printed = quoted(word)
        assert printed.isprintable()
        found = subprocess.run(["bash", "-c", f"printf %s {printed}"], capture_output=True).stdout
        assert found.decode(errors="surrogateescape") == word
