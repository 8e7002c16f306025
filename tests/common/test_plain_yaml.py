"""common/plain_yaml.py: what it reads and refuses, with libyaml and without."""

import pytest
import yaml

from common import plain_yaml

GOOD = {
    "settings": ("model: {d_model: 64, bias: false}\nlr: 0.001\nparts:\n- a\n- null\n", None),
    "a name that is not UTF-8": (yaml.safe_dump({"path": "a\udcff.txt"}), None),
    "numbers of each kind": ("[1, -2, 0x1f, 1e3, 1.5e-3, .inf, 2020-01-01, yes, '1', '12:30']", None),
    "letters of any kind": (yaml.safe_dump({"é": "\u202eü\x1b\U0001f600"}), None),
}
BAD = {
    "an alias": ("a: &a [1]\nb: [*a, *a]", "it holds an alias, in line 2"),
    "a long number": ("a: 0x" + "f" * 9000, "which is too long for a number, in line 1"),
    "a key twice": ("a: {b: 1,\n b: 2}", "it holds b for the second time, in line 2"),
    "a number in base 60": ("a: 190:20:30", "it holds 190:20:30, which YAML reads as a number in base 60, in line 1"),
    "a merge": ("a: 1\n<<: {a: 2}", "it holds <<, which would set what is set elsewhere, in line 2"),
    "a list cut short": ("a: [1,", "while parsing"),
    "text cut short": ("a: 'b", "while scanning"),
    "a tab": ("\ta: 1", "while scanning"),
    "a class": ("!!python/object:os.system 1", "could not determine a constructor"),
    "several documents": ("- 1\n---\n- 2", "expected a single document"),
    "a control character": ("a: \x07", "unacceptable character"),
    "no truth": ("a: 1\nb: !!bool maybe", "a value that does not fit its tag, in line 2"),
    "no number": ("!!float ''", "does not fit its tag"),
    "no date": ("!!timestamp x", "does not fit its tag"),
    "no day of a month": ("a: [1,\n 2020-02-31]", "a value that does not fit its tag, in line 2"),
    "a character beyond all": ('a: "\\UFFFFFFFF"', "it holds an escape or a version that is too large"),
    "a version beyond all": (f"%YAML {'9' * 5000}.1\n--- a", "it holds an escape or a version that is too large"),
    "a list as a key": ("? [a]\n: 1", "while constructing a mapping"),
}


@pytest.mark.parametrize("libyaml", [True, False])
@pytest.mark.parametrize(("text", "complaint"), (GOOD | BAD).values(), ids=GOOD | BAD)
def test_parse_is_the_same_with_libyaml_and_without(text, complaint, libyaml, monkeypatch):
    monkeypatch.setattr(yaml, "__with_libyaml__", libyaml and yaml.__with_libyaml__)
    if complaint is None:
        assert repr(plain_yaml.parse(text)) == repr(yaml.safe_load(text))
    else:
        with pytest.raises(yaml.YAMLError, match=complaint) as refusal:
            plain_yaml.parse(text)
        assert "\n" not in str(refusal.value)


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_parse_uses_libyaml_where_it_is(monkeypatch):
    monkeypatch.delattr(plain_yaml, "_Loader")
    assert plain_yaml.parse("a: 1") == {"a": 1}


@pytest.mark.parametrize("libyaml", [True, False])
def test_parse_endlessly_nested_raises_recursion_error(libyaml, monkeypatch):
    monkeypatch.setattr(yaml, "__with_libyaml__", libyaml and yaml.__with_libyaml__)
    for text in ("[" * 5_000, "{a: " * 5_000):
        with pytest.raises(RecursionError):
            plain_yaml.parse(text)
