"""Newton-Schulz iteration: the nearest semi-orthogonal matrix, U Vᵀ for the singular value decomposition U S Vᵀ."""

import torch
from torch import Tensor

from model.upcast import upcast

# Of the odd polynomial p(s) = a s + b s³ + c s⁵ (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): its
# slope at 0 is as steep as can be while p(p(...)) brings all of (0, 1] to within 0.3 of 1, and no nearer.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
MIN_NORM = 1e-7  # what matrices of zeros are divided by


def newton_schulz(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, rows, cols) -> about U Vᵀ of each, the same shape and dtype: singular values from about 0.7 to 1.2, but of
    those below some 1e-3 of the matrix's norm. Products are made in `dtype`, of the Gram matrix of the shorter side."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    norms = upcast(x).flatten(1).norm(dim=1).clamp_min(MIN_NORM)[:, None, None]
    x = (x / norms).to(dtype).contiguous()
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
