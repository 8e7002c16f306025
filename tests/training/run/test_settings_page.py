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
    if group in ("model", "attention", "tokenizer"):  # which other choices have a say in
        return composed_tree(f"{group}={name}", *NEEDS.get((group, name), ()))[group]
    return choice(group, name)  # the same, as test_composer.py has it


def class_of(group: str, name: str) -> type:
    return Dimensions if group == "model" else resolve_target(choice(group, name)["_target_"], PARTS[group], group)


def test_settings_page_is_current():
    assert (ROOT / "docs" / "settings.md").read_text() == page() + "\n", "see training/run/settings_page.py"


@pytest.mark.parametrize("group", (*PARTS, "model"))
def test_settings_of_each_choice_have_a_key_with_a_comment_and_each_key_a_field(group):
    for name in choices(group):
        path, cls = CONF / group / f"{name}.yaml", class_of(group, name)
        settings = settings_of(path)
        assert heading_of(path), name
        keys = composed(group, name).keys() - {"_target_"}
        fields = cls.model_fields.keys()
        assert keys == (fields - MASK if issubclass(cls, AttentionConfig) else fields), name
        assert settings.keys() == keys - {"position_embedding"}, name  # which position= sets
        assert not [key for key, setting in settings.items() if not setting.meaning], name


def test_settings_of_the_mask_are_fields_with_a_comment():
    assert AttentionConfig.model_fields.keys() >= MASK
    assert all(setting.meaning for setting in settings_of(CONF / "mask" / "sparse.yaml").values())


def test_settings_of_a_run_have_a_key_with_a_comment_and_each_key_a_field():
    settings = settings_of(CONF / "train.yaml")
    assert settings.keys() - set(OF_COMMANDS) == Run.model_fields.keys() - PARTS.keys() - {"model"}
    assert not [key for key, setting in settings.items() if not setting.meaning]
    composed = yaml.safe_load((CONF / "train.yaml").read_text())
    assert {key: yaml.safe_load(setting.default) for key, setting in settings.items()} == {
        key: value for key, value in composed.items() if key not in ("defaults", "hydra")
    }


def test_settings_page_has_the_values_that_hydra_composes():
    for group, name in CHOICES:
        found = composed(group, name)
        for key, setting in settings_of(CONF / group / f"{name}.yaml").items():
            if setting.default != "???" and key not in ("parts", "folder"):  # several lines; where the cache is
                stated = yaml.safe_load(setting.default)
                if isinstance(stated, dict):  # of a section, what this choice changes
                    assert found[key].items() >= stated.items(), key
                else:
                    assert found[key] == stated or found[key] == float(stated), key


def test_settings_classes_have_no_defaults_of_their_own():
    """But for kernels, which the program itself makes as well: theirs are those of conf/."""
    for cls in {class_of(group, name) for group, name in CHOICES} | {Run}:
        defaults = {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
        if not issubclass(cls, Kernel):
            assert not defaults, cls
        elif defaults:
            [name] = [name for group, name in CHOICES if group == "kernel" and class_of(group, name) is cls]
            assert choice("kernel", name) == {"_target_": f"{cls.__module__}.{cls.__name__}"} | defaults
