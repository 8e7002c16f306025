"""conf/ explains every setting and owns its default; docs/settings.md says the same."""

import pytest
import yaml

from common.conf_files import choices
from common.invocation import CONF
from model.attention.base import AttentionConfig
from model.dimensions import Dimensions
from model.kernels.base import Kernel
from tests.support import NEEDS, ROOT, composed_tree
from training.run.composer import choice
from training.run.config import OF_COMMANDS, Run
from training.run.parts import MODEL_PARTS, RUN_PARTS, resolve_target
from training.run.settings_page import heading_of, page, settings_of

PARTS = MODEL_PARTS | RUN_PARTS
CHOICES = [(group, name) for group in (*PARTS, "model") for name in choices(group)]


MASK = settings_of(CONF / "mask" / "sparse.yaml").keys()


def composed(group: str, name: str) -> dict:
    return composed_tree(f"{group}={name}", *NEEDS.get((group, name), ()))[group]


def class_of(group: str, name: str) -> type:
    return Dimensions if group == "model" else resolve_target(choice(group, name)["_target_"], PARTS[group], group)


def test_page_is_current():
    assert (ROOT / "docs" / "settings.md").read_text() == page() + "\n", "see training/run/settings_page.py"


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=str)
def test_each_field_has_a_key_with_a_comment_and_each_key_a_field(group, name):
    path = CONF / group / f"{name}.yaml"
    settings = settings_of(path)
    assert heading_of(path)
    keys = composed(group, name).keys() - {"_target_"}
    fields = class_of(group, name).model_fields.keys()
    assert keys == (fields - MASK if issubclass(class_of(group, name), AttentionConfig) else fields)
    assert settings.keys() == keys - {"position_embedding"}  # which position= sets
    assert not [key for key, setting in settings.items() if not setting.meaning]


def test_each_switch_of_the_mask_is_a_field_with_a_comment():
    assert AttentionConfig.model_fields.keys() >= MASK
    assert all(setting.meaning for setting in settings_of(CONF / "mask" / "sparse.yaml").values())


def test_so_has_each_setting_of_a_run():
    settings = settings_of(CONF / "train.yaml")
    assert settings.keys() - set(OF_COMMANDS) == Run.model_fields.keys() - PARTS.keys() - {"model"}
    assert not [key for key, setting in settings.items() if not setting.meaning]
    composed = yaml.safe_load((CONF / "train.yaml").read_text())
    assert {key: yaml.safe_load(setting.default) for key, setting in settings.items()} == {
        key: value for key, value in composed.items() if key not in ("defaults", "hydra")
    }


def test_page_has_the_values_that_hydra_composes():
    for group, name in CHOICES:
        found = composed(group, name)
        for key, setting in settings_of(CONF / group / f"{name}.yaml").items():
            if setting.default != "???" and key not in ("parts", "folder"):  # several lines; where the cache is
                stated = yaml.safe_load(setting.default)
                assert found[key] == stated or found[key] == float(stated), key


CLASSES = sorted({class_of(group, name) for group, name in CHOICES} | {Run}, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_settings_class_has_no_defaults_of_its_own(cls):
    """But for kernels, which the program itself makes as well: theirs are those of conf/."""
    defaults = {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
    if not issubclass(cls, Kernel):
        assert not defaults
    elif defaults:
        [name] = [name for group, name in CHOICES if group == "kernel" and class_of(group, name) is cls]
        assert choice("kernel", name) == {"_target_": f"{cls.__module__}.{cls.__name__}"} | defaults
