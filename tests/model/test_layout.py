"""ParamLayout: the tables of parameters, and what they refuse."""

import dataclasses

import pytest
import torch
from torch import nn

from model.attention.gqa import GQA
from model.initialise import initialised
from model.layout import Kind, Names, Part, Role, check_buffers, check_layouts, linear, nested, vector
from model.linear import Linear
from model.norm import LayerNorm, RMSNorm
from tests.support import small_config, small_model


def test_linear_describes_weight_and_bias_and_leaves_out_empty_parts():
    parts = (Part("q_nope", 3, clip_power=0.5), Part("q_rope", 0, clip_power=1.0))
    table = linear("q_proj", Linear(8, 6), Role.QUERY, 2, *parts, published=Names("q_b_proj"))
    weight, bias = table["q_proj.weight"], table["q_proj.bias"]
    assert weight.parts == bias.parts == parts[:1] and weight.rows == bias.rows == 6
    assert (weight.fan_in, bias.fan_in) == (8, None) and (weight.kind, bias.kind) == (Kind.MATRIX, Kind.BIAS)
    assert weight.published == Names("q_b_proj.weight", None) and bias.published == Names("q_b_proj.bias", None)
    assert weight.views(torch.zeros(6, 8))["q_nope"].shape == (2, 3, 8)
    assert weight.whole().views(torch.zeros(6, 8))["whole"].shape == (1, 6, 8)
    assert linear("q_proj", None, Role.QUERY) == {}


def test_vector_describes_a_parameter_that_is_no_modules_weight():
    module = nn.Module()
    module.temperature = nn.Parameter(torch.ones(4))
    table = vector("temperature", module.temperature, Role.NORM)
    check_layouts(module, table)
    assert table["temperature"].kind is Kind.VECTOR and table["temperature"].shard_axis is None


def test_nested_of_modules_without_parameters_is_empty():
    assert nested("norm", nn.Identity()) == nested("norm", None) == {}
    assert list(nested("norm", RMSNorm(4))) == ["norm.weight"]
    assert [layout.kind for layout in nested("norm", LayerNorm(4, True)).values()] == [Kind.VECTOR, Kind.BIAS]


def test_shard_axis_splits_heads_hidden_units_and_vocabulary():
    choices = ("attention=mla", "attention.q_lora_rank=24", "mlp=swiglu", "model.bias=true", "model.norm=layer")
    table = small_model(*choices).layout()
    axes = {name.removeprefix("layers.0."): layout.shard_axis for name, layout in table.items()}
    by_rows = ("attention.q_proj.up.weight", "attention.q_proj.up.bias", "attention.kv_up.weight", "embedding.weight")
    assert all(axes[name] == 0 for name in (*by_rows, "mlp.gate_proj.weight", "mlp.up_proj.bias"))
    assert axes["attention.o_proj.weight"] == axes["mlp.down_proj.weight"] == 1
    whole = ("attention.o_proj.bias", "attention.kv_down.weight", "attention.kv_norm.weight", "norm.bias")
    assert all(axes[name] is None for name in (*whole, "attention.q_proj.down.weight", "mlp_norm.weight"))
    single = small_model("attention=mqa").layout()  # its one key head is every query head's
    assert single["layers.0.attention.k_proj.weight"].shard_axis is None


class Forgetful(GQA):
    """An attention whose writer forgot to describe a parameter."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gate = Linear(64, 64, bias=False)


def test_model_with_a_parameter_in_no_layout_says_which(monkeypatch):
    monkeypatch.setattr("model.attention.gqa.GQA", Forgetful)
    with pytest.raises(ValueError, match=r"^layers\.0\.attention\.gate\.weight is in no layout\(\): add it to that of"):
        initialised(small_config("attention=gqa"), 100)


def test_check_layouts_finds_what_is_no_parameter_and_other_sizes():
    module = nn.ModuleDict({"norm": RMSNorm(4)})
    table = nested("norm", module["norm"])
    check_layouts(module, table)
    with pytest.raises(ValueError, match="other is in a layout"):
        check_layouts(module, {**table, "other": table["norm.weight"]})
    with pytest.raises(ValueError, match=r"norm\.weight has 4 rows, and 5 in its layout"):
        check_layouts(module, {"norm.weight": dataclasses.replace(table["norm.weight"], parts=(Part("whole", 5),))})


@pytest.mark.parametrize(
    ("buffer", "persistent", "complaint"),
    [
        (torch.ones(2), False, "the buffer inner.count is not saved"),
        (torch.tensor(1), True, "inner.count is torch.int64"),
    ],
)
def test_check_buffers_refuses_one_that_no_checkpoint_brings_back(buffer, persistent, complaint):
    module = nn.Sequential()
    module.inner = nn.Identity()
    module.inner.register_buffer("mean", torch.zeros(2))
    check_buffers(module)
    module.inner.register_buffer("count", buffer, persistent=persistent)
    with pytest.raises(ValueError, match=complaint):
        check_buffers(module)
