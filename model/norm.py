"""RMSNorm and LayerNorm over the last dimension, computed in float32; they return the dtype of their input."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.dimensions import Dimensions
from model.layout import Kind, ParamLayout, Role, leaf
from model.upcast import upcast

RMS_EPS = 1e-6
LAYER_EPS = 1e-5

Normer = Callable[[Tensor], Tensor]


class RMSNorm(nn.Module):
    """x · weight / sqrt(mean(x²) + eps) (Zhang & Sennrich 2019, arXiv:1910.07467). On CUDA it is one kernel; elsewhere
    PyTorch differentiates each product of it, which takes up to three times as long as the formula in _RMSNorm."""

    def __init__(self, dim: int, eps: float = RMS_EPS):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(upcast(x), self.weight.shape, self.weight, eps=self.eps).to(x.dtype)
        if not torch.is_grad_enabled():
            return _rms_norm(x, self.weight, self.eps)[0]  # the same bits in a third of a token's time
        return _RMSNorm.apply(x, self.weight, self.eps)

    def layout(self) -> dict[str, ParamLayout]:
        return leaf(self, Role.NORM, Kind.VECTOR)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm in the dtype of x, and inv, float32."""
    exact = upcast(x)
    norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    inverse = norm.mul_(norm).div_(x.shape[-1]).add_(eps).rsqrt_()
    y = exact * inverse if exact is x else exact.mul_(inverse)
    return y.mul_(weight).to(x.dtype), inverse


def rms_normer(weight: Tensor, eps: float = RMS_EPS) -> Normer:
    """RMSNorm without gradients for few numbers, in the fewest operations: x (..., d) -> the same. weight: (d,), or
    (H, d) for a norm of each head of x (..., H, d)."""
    dim = weight.shape[-1]
    shortest = torch.tensor((dim * eps) ** 0.5, device=weight.device)
    scaled = weight.detach() * dim**0.5

    def norm(x: Tensor) -> Tensor:
        exact = upcast(x)
        length = torch.hypot(torch.linalg.vector_norm(exact, dim=-1, keepdim=True), shortest)
        return exact.div(length).mul_(scaled).to(x.dtype)

    return norm


class _RMSNorm(torch.autograd.Function):
    """y = w ∘ u, where u = x · inv and inv = 1 / sqrt(mean(x²) + eps). Saves x in its dtype and inv, one value per row.

    dw = Σ over rows of inv · p        dx = inv · w ∘ dy - x · inv³ · (p · w) / d        where p = dy ∘ x
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y.detach()  # its own: compiled by PyTorch 2.11, what an operation in place returned has no gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        inverse = inverse.view(-1, 1)
        exact = upcast(x).reshape(-1, x.shape[-1])
        d_x = d_y.to(exact.dtype, copy=True, memory_format=torch.contiguous_format).view(-1, x.shape[-1])
        product = d_x * exact
        along = torch.mv(product, weight)[:, None] * inverse**3 / x.shape[-1]
        d_x.mul_(weight).mul_(inverse).addcmul_(exact, along, value=-1)
        return d_x.to(x.dtype).view_as(x), torch.mv(product.mT, inverse.flatten()), None


class LayerNorm(nn.Module):
    """(x - mean(x)) · weight / sqrt(var(x) + eps) + bias (Ba et al. 2016, arXiv:1607.06450); var divides by n."""

    def __init__(self, dim: int, bias: bool, eps: float = LAYER_EPS):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        exact = upcast(x)
        weight, bias = (None if part is None else part.to(exact.dtype) for part in (self.weight, self.bias))
        return F.layer_norm(exact, self.weight.shape, weight, bias, eps=self.eps).to(x.dtype)

    def layout(self) -> dict[str, ParamLayout]:
        return leaf(self, Role.NORM, Kind.VECTOR)


class GroupedRMSNorm(nn.Module):
    """RMSNorm of heads (..., H, n) with one root mean square for each of G groups of neighbouring heads, and one weight
    (n,) for all heads: x[h] · weight · inv[g(h)], inv[g] = 1 / sqrt(mean over the group's heads and dims of x² + 1e-6).
    With G = H it is RMSNorm of each head. Given `inverse_rms` it is linear in x, which is what absorbed MLA uses."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(dim))

    def inverse_rms(self, x: Tensor) -> Tensor:
        """inv of each group: (..., H, n) -> (..., G) in float32."""
        return inverse_rms(x, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return (upcast(x) * _per_head(self.inverse_rms(x), x.shape[-2]) * self.weight).to(x.dtype)

    def layout(self) -> dict[str, ParamLayout]:
        return leaf(self, Role.NORM, Kind.VECTOR)


def inverse_rms(x: Tensor, groups: int) -> Tensor:
    """1 / sqrt(mean of x² + 1e-6) over the heads and dims of each group of neighbouring heads: (..., H, n) -> (..., G)
    in float32."""
    return (upcast(x).unflatten(-2, (groups, -1)).square().mean((-2, -1)) + RMS_EPS).rsqrt()


def unit_rms(x: Tensor, groups: int) -> Tensor:
    """GroupedRMSNorm without a weight: x (..., H, n) times its group's inverse_rms."""
    return (upcast(x) * _per_head(inverse_rms(x, groups), x.shape[-2])).to(x.dtype)


def _per_head(inverse: Tensor, heads: int) -> Tensor:
    """Repeat a value of each group for its heads: (..., G) -> (..., H, 1)."""
    return inverse.repeat_interleave(heads // inverse.shape[-1], dim=-1)[..., None]


def normer(norm: nn.Module) -> Normer:
    """A norm of a residual stream as a function, without gradients, for few tokens."""
    return rms_normer(norm.weight, norm.eps) if type(norm) is RMSNorm else norm.forward


def are_plain(*norms: nn.Module) -> bool:
    """Whether these are RMSNorms or nothing, as they were built."""
    return all(type(norm) in (RMSNorm, nn.Identity) for norm in norms)


def residual_norm(dimensions: Dimensions) -> nn.Module:
    """Build a norm of the residual stream, ahead of an attention, an MLP or the LM head. Norms within an attention (of
    queries, keys and latents) are always RMSNorms, as in their papers."""
    if dimensions.norm == "layer":
        return LayerNorm(dimensions.d_model, dimensions.bias, dimensions.norm_eps or LAYER_EPS)
    return RMSNorm(dimensions.d_model, dimensions.norm_eps or RMS_EPS)
