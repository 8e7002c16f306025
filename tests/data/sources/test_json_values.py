"""Streamed JSON equals json.loads, however few characters are in memory at one time."""

import io
import json

import pytest

from data.sources import json_values

ROWS = [{"text": f'{"long " * (i % 40)}"\\ünï🙂\n', "n": [i, {"a": None}]} for i in range(60)]
FORMS = {
    "array": json.dumps(ROWS),
    "indented": json.dumps(ROWS, indent=4, ensure_ascii=False),
    "lines": "\n".join(map(json.dumps, ROWS)),
    "several lines each": "\n".join(json.dumps(row, indent=2) for row in ROWS) + "\n\n",
    "side by side": "".join(map(json.dumps, ROWS)),
}


@pytest.fixture(params=[1, 7, 100, 2**16], autouse=True)
def block(request, monkeypatch):
    monkeypatch.setattr(json_values, "READ_CHARS", request.param)


def values(text: str) -> list:
    return list(json_values.values(io.StringIO(text)))


def test_values_of_any_form_are_those_of_json_loads_in_order():
    for form, text in FORMS.items():
        assert values(text) == ROWS, form
    for nothing in ("[]", " [ ] ", "", " \n"):
        assert values(nothing) == []


BAD = [
    "[",
    '[{"a": 1}',
    '[{"a": 1},',
    '[{"a": 1} {"b": 2}]',
    '[{"a": 1},]',
    '[{"a": 1}] x',
    '{"a": ',
    '{"a": "x',
    "{oops}",
]


def test_values_of_what_is_no_json_raise_value_error():
    for text in [*BAD, '[{"a": tru}]', '{"a": 1} x', '{"a": "\\u12"}']:
        with pytest.raises(ValueError, match=r"."):
            values(text)


def test_values_of_an_error_at_the_start_read_no_more():
    file = io.StringIO('[{"text": "x" "n": 1},' + FORMS["array"][1:-1] * 200 + "]")
    with pytest.raises(ValueError, match="delimiter"):
        list(json_values.values(file))
    assert file.tell() <= 2 * max(json_values.READ_CHARS, 100)
