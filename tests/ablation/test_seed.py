"""What runs of one seed share, and runs of two seeds do not: what makes their differences pairs."""

import pytest
import torch

from model.initialise import initialised
from tests.support import small_config


def weights(seed: int, *overrides: str) -> dict[str, torch.Tensor]:
    return initialised(small_config("model.zero_init=false", *overrides), 100, seed).state_dict()


@pytest.mark.parametrize("variant", ["attention=gqa", "attention=mla", "mlp.d_ff=264"])
def test_initialised_variants_of_one_seed_share_weights_of_equal_name_and_shape(variant):
    one = weights(1, "attention=mha")
    other = weights(1, "attention=mha", variant)
    shared = [name for name in one if name in other and one[name].shape == other[name].shape]
    assert "embedding.weight" in shared and "layers.1.attention.o_proj.weight" in shared
    assert all(torch.equal(one[name], other[name]) for name in shared)


def test_initialised_seeds_of_one_variant_share_no_random_weight():
    one = weights(1)
    other = weights(2)
    random = [name for name in one if one[name].ndim > 1]
    assert random and not any(torch.equal(one[name], other[name]) for name in random)
    assert not any((one[name] == other[name]).float().mean() > 0.01 for name in random)
