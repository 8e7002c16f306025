"""The files of a report."""

import json
import math
from dataclasses import asdict, fields, replace

import pytest

from ablation.pages import pictures
from ablation.pages.files import as_json, write
from ablation.results import Report
from common.errors import UserError
from tests.ablation import support


def test_write_report_gives_every_file_of_it(tmp_path):
    folder = tmp_path / "a" / "b"
    paths = write(support.four(), folder)
    names = ["report.html", "report.md", "report.json", "curves.png", "final.png", "frontier.png"]
    assert [path.name for path in paths] == names and sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name in names[3:]:
        assert f"]({name})" in (folder / "report.md").read_text()


def test_as_json_has_every_field_in_order_and_all_digits():
    report = support.four()
    found = json.loads(as_json(report))
    assert list(found) == [field.name for field in fields(Report)]
    assert found == json.loads(json.dumps(asdict(report)))
    assert found["variants"][2]["val_bpb"]["mean"] == report.variants[2].val_bpb.mean


def test_as_json_of_any_names_is_valid_and_keeps_them():
    found = json.loads(as_json(support.weird()).encode(errors="backslashreplace"))
    assert [variant["name"] for variant in found["variants"]] == support.NAMES


def test_as_json_of_what_is_not_finite_has_null():
    report = replace(support.four(), environment={"a": math.nan, "b": [math.inf, 1], "c": "[ 1, 2 ]"})
    assert json.loads(as_json(report))["environment"] == {"a": None, "b": [None, 1], "c": "[ 1, 2 ]"}


def test_write_report_to_a_bad_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "figures", lambda *_: {})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"no report can be written to .*file/x: .*; choose another folder by -o"):
        write(support.four(), tmp_path / "file" / "x")
    (tmp_path / "out" / "report.md").mkdir(parents=True)
    with pytest.raises(UserError, match=r"report.md cannot be written"):
        write(support.four(), tmp_path / "out")
