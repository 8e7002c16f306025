"""What bash offers at TAB, as its own function answers."""

import shutil
import subprocess

import pytest

from tests.support import call

# compopt works only while TAB is being answered.
ASK = """
hydra_bash_completion() { COMPREPLY=(hydra); }
compopt() { echo "compopt $*"; }
eval "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_headroom_python
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def offered(monkeypatch, capsys):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    assert call("sample", ["--completion"], monkeypatch) == 0
    script = capsys.readouterr().out

    def ask(*words: str) -> list[str]:
        result = subprocess.run(["bash", "-c", ASK, "bash", script, *words], capture_output=True, text=True)
        assert result.stderr == ""
        return result.stdout.split("\n")[:-1]

    return ask


def test_options_and_their_choices_are_offered(offered):
    assert offered("python", "sample.py", "--t") == ["--temperature", "--top-k", "--top-p"]
    assert offered(".venv/bin/python", "./sample.py", "def solve(", "--in") == ["--interactive"]
    assert offered("python", "sample.py", "--context", "") == ["stop", "slide"]
    assert offered("python", "sample.py", "x", "--precision", "fp") == ["fp16", "fp32"]
    assert {"--seed", "--kernel", "--score"} < set(offered("python", "sample.py", ""))


def test_the_rest_is_left_to_bash(offered):
    for words in (["python", "sam"], ["python", "sample.py", "--prompt-file", "a"], ["python", "other.py", "--t"]):
        assert offered(*words) == [""], words  # files, by default
    assert offered("python", "sample.py", "--top-k", "") == ["compopt +o default", ""]  # no files
    assert offered("python", "sample.py", "--run", "r") == ["compopt +o default -o dirnames", ""]


def test_train_is_left_to_hydra(offered):
    assert offered("python", "train.py", "at") == ["compopt -o nospace", "hydra"]


def test_runs_are_offered_where_a_run_is_asked_for(offered, workplace):
    for name in ("a", "b"):
        (workplace / "runs" / name).mkdir(parents=True)
    assert offered("python", "train.py", "resume=r") == ["compopt -o nospace", "resume=runs/"]
    runs = ["init_from=runs/a/", "init_from=runs/b/"]
    assert sorted(offered("python", "train.py", "init_from=runs/")) == ["compopt -o nospace", *runs]
