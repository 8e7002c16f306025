"""PyTorch's fused attention: flash, memory-efficient or cuDNN, never its unfused math fallback."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from model.errors import Unsupported
from model.kernels.base import Kernel, announce, group_queries
from model.mask import Mask

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
DEVICES = ("cpu", "cuda")  # where the list above is what PyTorch obeys
QUERY_TILE = 256  # queries whose boolean mask exists at one time
KEPT_KEYS = 1024  # how wide a tile's mask may be to be kept for the backward pass


class SDPA(Kernel):
    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        if device.type not in DEVICES:
            raise Unsupported(
                f"kernel=sdpa knows its fused kernels on cpu and cuda, not on {device.type}: kernel=naive"
            )
        if dropout and device.type == "cpu":
            raise Unsupported(
                "kernel=sdpa drops no attention weights on a CPU: kernel=auto or matmul, or attention.dropout=0"
            )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
        self.check(q.device, q.requires_grad, dropout > 0)
        asked, value_dim = (q, k, v), v.shape[-1]
        # The fused kernels want q, k and v equally wide. Zero columns change neither scores (the scale is explicit)
        # nor the values that are kept.
        width = max(q.shape[-1], value_dim)
        q, k, v = (widened(x, width) for x in (q, k, v))
        if mask.unrestricted:
            out = _causal(q, k, v, scale, dropout)
        else:
            out = by_positions(q, k, v, mask, scale, dropout, _fused)
        announce("sdpa (flash)" if q.device.type == "cpu" else "sdpa (fused)", *asked, mask)
        return out[..., :value_dim]


def widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.device.type == "cuda" and q.dtype == torch.float32:
        # float32 has the memory-efficient kernel only, which does not know groups
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        grouped = False
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    how = {"is_causal": True, "scale": scale, "dropout_p": dropout, "enable_gqa": grouped}
    return _fused(*heads_first, **how).transpose(1, 2)


def by_positions(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float, fused: Callable[..., Tensor]
) -> Tensor:
    """With a boolean mask, a tile of queries at a time, against the keys that the tile may see at most: with a window,
    neither memory nor time grows as T × S. Memory does not without one either: a mask wider than KEPT_KEYS is not kept
    for the backward pass, where the tile is computed anew.

    The query heads that share a key head become rows of one head, so keys are read once and never repeated.

    fused(q, k, v, attn_mask=, scale=, dropout_p=): (B, heads, rows, D) each, as F.scaled_dot_product_attention.
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, S, D)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))

    def tile(q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice) -> Tensor:
        grouped = group_queries(q, k.shape[1])  # (B, t, G, R, D)
        t, repeats = grouped.shape[1], grouped.shape[3]
        visible = mask.visible(rows, keys)[:, None]  # (B or 1, 1, t, s)
        if t > 1:
            visible = visible.repeat_interleave(repeats, dim=2)  # (B or 1, 1, t·R, s); a single query broadcasts
        out = fused(
            grouped.permute(0, 2, 1, 3, 4).flatten(2, 3), k, v, attn_mask=visible, scale=scale, dropout_p=dropout
        )
        return out.unflatten(2, (t, repeats)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # (B, t, H, D)

    outputs = []
    for start in range(0, q.shape[1], QUERY_TILE):
        rows = slice(start, min(start + QUERY_TILE, q.shape[1]))
        keys = mask.span(rows)
        inputs = q[:, rows], k[:, :, keys], v[:, :, keys], rows, keys
        if trains and keys.stop - keys.start > KEPT_KEYS:
            outputs.append(checkpoint(tile, *inputs, use_reentrant=False, preserve_rng_state=dropout > 0))
        else:
            outputs.append(tile(*inputs))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _fused(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
    """(B, heads, rows, D) each. Refuses, where PyTorch would fall to its slow math path in silence."""
    try:
        with sdpa_kernel(BACKENDS):
            return F.scaled_dot_product_attention(q, k, v, **how)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise Unsupported(
            f"kernel=sdpa has no fused kernel for head dim {q.shape[-1]}, {q.dtype} on {q.device.type}: "
            "choose kernel=naive, or a smaller head dim"
        ) from None
