"""Which cells a command makes, how they are named, and what is refused."""

import re

import pytest

from ablation.sweep.grid import MAX_NAME, check_known, grid_of
from common.errors import UserError

NAMES = {
    "by seed, then by variant": (
        ["attention=mha,mla", "seed=1,2"],
        ["attention=mha,seed=1", "attention=mla,seed=1", "attention=mha,seed=2", "attention=mla,seed=2"],
    ),
    "in one order, however it was typed": (
        ["seed=1,2", "attention=mla,mha"],
        ["attention=mla,seed=1", "attention=mha,seed=1", "attention=mla,seed=2", "attention=mha,seed=2"],
    ),
    "a range": (["seed=range(3,5)", "steps=7"], ["seed=3", "seed=4"]),
    "a pattern": (["attention=glob(m*)"], ["attention=mha", "attention=mla", "attention=mqa"]),
    "digits": (["steps=1e3,2e3"], ["steps=1000", "steps=2000"]),
    "a setting where it exists": (
        ["attention=mla,gqa", "if:attention.kv_lora_rank=8,16"],
        ["attention=mla,attention.kv_lora_rank=8", "attention=mla,attention.kv_lora_rank=16", "attention=gqa"],
    ),
    "one value where it exists": (
        ["attention=mla,gqa", "if:attention.kv_lora_rank=8"],
        ["attention=mla", "attention=gqa"],
    ),
    "in a part of a stack": (
        ["attention=stack,mha", "if:attention.parts.local.window=8"],
        ["attention=stack", "attention=mha"],
    ),
    "quoted, and not": (
        ["sample_prompt='a, b',c,_é"],
        ["sample_prompt=a,_b-2782cf", "sample_prompt=c", "sample_prompt=__-da9fe8"],
    ),
    "a switch of the mask": (["attention=stack,mha", "if:attention.window=8"], ["attention=stack", "attention=mha"]),
}


@pytest.mark.parametrize(("typed", "names"), NAMES.values(), ids=NAMES)
def test_grid_cells_are_named_after_what_varies(typed, names):
    grid = grid_of(typed)
    check_known(grid.cells, grid.varying)
    assert [cell.name for cell in grid.cells] == names


def test_grid_marked_setting_is_given_only_to_the_choice_that_has_it():
    grid = grid_of(["attention=mla,gqa", "if:attention.kv_lora_rank=8", "seed=5"])
    assert [cell.overrides for cell in grid.cells] == [
        ["attention.kv_lora_rank=8", "attention=mla", "seed=5"],
        ["attention=gqa", "seed=5"],
    ]
    assert [(cell.variant, cell.seed) for cell in grid.cells] == [("attention=mla", 5), ("attention=gqa", 5)]


def test_grid_names_are_folders_of_any_file_system_and_never_collide():
    grid = grid_of(["sample_prompt='a/b','a b','a_b',..", f"data.path={'x' * 300}a,{'x' * 300}b", "data=files"])
    names = [cell.name for cell in grid.cells]
    assert len(set(names)) == 8
    assert all(len(name) <= MAX_NAME + 7 and "/" not in name and not name.startswith(".") for name in names)


REFUSED = {
    "marked, and nowhere": (["attention=mha,mla", "if:attention.nonsense=8"], "if:attention.nonsense: no such setting"),
    "marked, and of another": (
        ["attention=mha,gqa", "if:attention.kv_lora_rank=8"],
        "if:attention.kv_lora_rank: no such setting of attention=mha; it belongs to attention=dsa or mla",
    ),
    "nothing varies": (["attention=mla"], "nothing varies: give several values"),
    "no such experiment": (["experiment=study/nope"], "study/nope"),
    "nothing at all": ([], "nothing varies"),
    "one value twice": (["seed=1,2,1"], "gives seed=1 twice: a sweep has one run of each value"),
    "too many": (["seed=range(0,200)", "steps=range(1,200)"], "would be 39,800 runs, 10,000 are the most"),
    "of one choice": (
        ["attention=mla,gqa", "attention.kv_lora_rank=8"],
        "attention.kv_lora_rank is no setting of attention=gqa, but of attention=mla: "
        "write if:attention.kv_lora_rank=8, and it applies where it exists",
    ),
    "of no choice": (["attention=mla,gqa", "attention.kv_lora_rnk=8"], "did you mean kv_lora_rank?"),
    "twice, once marked": (["if:attention.window=4", "attention.window=8", "seed=1,2"], "give attention.window twice"),
}


@pytest.mark.parametrize(("typed", "complaint"), REFUSED.values(), ids=REFUSED)
def test_grid_refuses_in_one_line(typed, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        grid = grid_of(typed)
        check_known(grid.cells, grid.varying)
