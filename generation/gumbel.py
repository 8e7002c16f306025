"""Random numbers of sampling: Gumbel noise that is a function of (seed, index, token), by integer hashes on any device.

Token i of a text is the argmax over v of logit(v) / T + g(seed, i, v), with g from the standard Gumbel distribution:
exactly a draw from softmax(logits / T) (the Gumbel-max trick; Maddison et al. 2014, arXiv:1411.0030, section 2). i is
its index in the whole text, the prompt and what slid out of the context counted. There is no generator to advance, so a
text depends neither on its neighbours in a batch, nor on the turns in which it was written, nor on what was drafted and
thrown away; and a first part of it, as the prompt, is continued as it was.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators", doi:10.1145/2660193.2660195) in
# int64, whose products wrap around.
INCREMENT = 0x9E3779B97F4A7C15 - 2**64
FACTOR_1 = 0xBF58476D1CE4E5B9 - 2**64
FACTOR_2 = 0x94D049BB133111EB - 2**64
MAX_INT64 = 2**63 - 1


def mix(x: Tensor) -> Tensor:
    """Hash int64 to int64, one to one: every bit of the result depends on all bits of x."""
    return _fold(_scramble(x + INCREMENT), 31)


def _scramble(x: Tensor) -> Tensor:
    """`mix`, in place, but for its last step, which the high bits do not need."""
    _fold(x, 30).mul_(FACTOR_1)
    return _fold(x, 27).mul_(FACTOR_2)


def _fold(x: Tensor, shift: int) -> Tensor:
    """x ^= x >> shift, in place. The mask makes the shift a logical one: PyTorch's repeats the sign."""
    return x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1))


def hash_seeds(seeds: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Hash the seed of each row -> (B,) int64, as `gumbel` takes them. This round, before the index is added, is why
    (s + 1, i) does not meet (s, i + 1)."""
    return mix(torch.tensor(seeds, dtype=torch.int64, device=device))


def gumbel(hashed_seeds: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise of the tokens (V,), or (B, V) of each row its own, at the indices (B,) of texts -> (B, V)
    float32: -log(-log(1 - u)), u uniform in (0, 1).

    Large noise, by which unlikely tokens win, is where u is near 0 and -log(1 - u) ≈ u. There a float32 of 63 random
    bits has all its 24 digits, so tokens of any probability are drawn as often as they should be. Near 1 it has not:
    one u in 10^7 is cut off at 1 - eps, where the noise is -2.8 and hardly any token wins.
    """
    keys = mix(hashed_seeds + indices)
    hashes = _scramble(keys[:, None] + tokens).bitwise_and_(MAX_INT64)
    minus_u = hashes.float().mul_(-(2.0**-63)).clamp_(torch.finfo(torch.float32).eps - 1, -(2.0**-64))
    return minus_u.log1p_().neg_().log_().neg_()
