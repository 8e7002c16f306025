"""PyTorch's fused attention: flash, memory-efficient or cuDNN, never its unfused math fallback."""

import importlib
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.nn.attention as fused_attention
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from common.errors import Unsupported
from model.kernels.base import Kernel, announce, group_queries
from model.mask import Mask

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# Error messages of PyTorch, and of cuDNN, if a backend has no kernel for a call.
NO_KERNEL_MESSAGES = (
    "no available kernel",
    "no viable backend",
    "no valid engine",
    "no execution plan",
    "cudnn frontend error",
)
ACTIVATED: set[str] = set()  # flash kernels that this process activated in place of PyTorch's own
PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}  # what PyTorch's adapter for each imports
DEVICES = ("cpu", "cuda")  # where sdpa_kernel(BACKENDS) is obeyed
QUERY_TILE = 256  # queries whose boolean mask is in memory at one time
MAX_SAVED_MASK_KEYS = 1024  # width up to which a tile's mask is saved for the backward pass


class SDPA(Kernel):
    """torch.nn.functional.scaled_dot_product_attention, restricted to its fused backends."""

    # Forces the backend for causal attention in low precision. Elsewhere, as in a float32 preview that decodes under a
    # mask, and everywhere if this is unset, PyTorch chooses.
    backend: Literal["flash", "efficient", "cudnn"] | None = None
    flash: Literal["FA3", "FA4"] | None = None  # on a GPU, replaces PyTorch's own flash kernel

    @model_validator(mode="after")
    def _check_flash_backend(self) -> Self:
        if self.flash and self.backend not in (None, "flash"):
            raise ValueError(f"kernel.flash={self.flash} does nothing with kernel.backend={self.backend}: unset one")
        return self

    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        if device.type not in DEVICES:
            raise Unsupported(
                f"kernel=sdpa knows its fused kernels on cpu and cuda, not on {device.type}: kernel=naive"
            )
        if self.flash and device.type != "cuda":
            raise Unsupported(f"kernel.flash={self.flash} runs on a GPU, not on {device.type}: leave it unset")
        if self.flash:
            _check_flash_available(self.flash)
        if self.backend not in (None, "flash") and device.type == "cpu":
            raise Unsupported(f"kernel.backend={self.backend} runs on a GPU, not on cpu: leave it unset")
        if self.backend == "cudnn" and not torch.backends.cudnn.is_available():
            raise Unsupported("kernel.backend=cudnn: there is no cuDNN here: leave kernel.backend unset")
        if dropout and device.type == "cpu":
            raise Unsupported(
                "kernel=sdpa drops no attention weights on a CPU: kernel=auto or matmul, or attention.dropout=0"
            )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
        self.check(q.device, q.requires_grad, dropout > 0)
        if q.device.type == "cuda":
            _activate(self.flash)
        inputs = (q, k, v)
        value_dim = v.shape[-1]
        # Fused kernels need q, k and v equally wide. Zero columns change neither scores (the scale is explicit) nor the
        # output columns that are returned.
        width = max(q.shape[-1], value_dim)
        q, k, v = (widened(x, width) for x in (q, k, v))
        fused = FusedSDPA(self.backend if mask.is_plain_causal and q.dtype != torch.float32 else None)
        if mask.is_plain_causal:
            out = _causal(q, k, v, scale, dropout, fused)
        else:
            out = by_positions(q, k, v, mask, scale, dropout, fused)
        announce(f"sdpa ({fused.ran})", *inputs, mask)
        return out[..., :value_dim]


def widened(x: Tensor, width: int) -> Tensor:
    """Pad the last dimension with zeros to `width`."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, fused: Callable[..., Tensor]) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.device.type == "cuda" and q.dtype == torch.float32:
        # in float32 only the memory-efficient kernel runs, which does not support grouped heads
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        grouped = False
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    options = {"is_causal": True, "scale": scale, "dropout_p": dropout, "enable_gqa": grouped}
    return fused(*heads_first, **options).transpose(1, 2)


def by_positions(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float, fused: Callable[..., Tensor]
) -> Tensor:
    """Attention with a boolean mask from positions, a tile of queries at a time against the span of keys they may see.

    With a window, neither memory nor time grows as T × S. Without one memory does not either: a mask wider than
    MAX_SAVED_MASK_KEYS is not saved for the backward pass, which recomputes the tile.

    The query heads that share a KV head become rows of one head, so keys are read once and never repeated.

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
        if trains and keys.stop - keys.start > MAX_SAVED_MASK_KEYS:
            outputs.append(checkpoint(tile, *inputs, use_reentrant=False, preserve_rng_state=dropout > 0))
        else:
            outputs.append(tile(*inputs))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class FusedSDPA:
    """F.scaled_dot_product_attention with fused backends only; `ran` names the one that ran."""

    ran = "fused"

    def __init__(self, backend: str | None):
        self.backend = backend
        self.allowed = list(BACKENDS.values()) if backend is None else [BACKENDS[backend]]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """q, k, v: (B, heads, rows, D). Raises Unsupported where PyTorch would silently take its slow math path."""
        try:
            with sdpa_kernel(self.allowed):
                if not torch.compiler.is_compiling():  # setting an attribute breaks the trace of a recomputed tile
                    self.ran = _chosen(q, k, v, options)
                return F.scaled_dot_product_attention(q, k, v, **options)
        except RuntimeError as error:
            if not any(message in str(error).lower() for message in NO_KERNEL_MESSAGES):
                raise
            missing = "no fused kernel"
            way_out = "choose kernel=naive, or a smaller head dim"
            if self.backend is not None:
                missing = f"no {self.backend} kernel"
                way_out = "leave kernel.backend unset, and PyTorch chooses another"
            raise Unsupported(
                f"kernel=sdpa has {missing} for head dim {q.shape[-1]}, {q.dtype} on {q.device.type}: {way_out}"
            ) from None


def _chosen(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> str:
    """Name the backend that PyTorch chooses for this call; "fused" if it does not tell."""
    if q.device.type == "cpu":
        return "flash"
    if not hasattr(torch, "_fused_sdp_choice"):
        return "fused"
    choice = torch._fused_sdp_choice(q, k, v, **options)
    name = next((name for name, backend in BACKENDS.items() if int(backend) == choice), "fused")
    active = _current_flash()
    return f"{name}, {active}" if name == "flash" and active else name


def _activate(flash: str | None) -> None:
    """Activate a flash kernel for the whole process: PyTorch has one at a time. None restores its own, if this process
    activated another. Raises Unsupported if it cannot be activated."""
    if _current_flash() == flash:
        return
    if flash is None:
        if _current_flash() in ACTIVATED:
            fused_attention.restore_flash_attention_impl()
        return
    _check_flash_available(flash)
    try:
        fused_attention.activate_flash_attention_impl(flash)
        ACTIVATED.add(flash)
    except Exception as error:  # whatever an incompatible package raises
        raise _unusable_package(flash, error) from None


def _check_flash_available(flash: str) -> None:
    """Raise Unsupported if PyTorch does not offer this flash kernel or its package cannot be imported."""
    if flash not in _offered_flash():
        raise Unsupported(
            f"kernel.flash={flash}: PyTorch {torch.__version__} offers {', '.join(_offered_flash()) or 'none'} beside "
            "its own: leave it unset"
        )
    try:
        importlib.import_module(PACKAGES[flash])
    except Exception as error:
        raise _unusable_package(flash, error) from None


# In compiled code they run when the call is traced, as say_once does.
_activate._dynamo_marked_constant = _check_flash_available._dynamo_marked_constant = True


def _unusable_package(flash: str, error: Exception) -> Unsupported:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return Unsupported(
        f"kernel.flash={flash} needs the package {PACKAGES[flash]}, of FlashAttention: {reason}: install it, or "
        "leave kernel.flash unset"
    )


def _offered_flash() -> list[str]:
    """Flash kernels that PyTorch can activate beside its own; older versions have none."""
    known = hasattr(fused_attention, "list_flash_attention_impls")
    return fused_attention.list_flash_attention_impls() if known else []


def _current_flash() -> str | None:
    """The flash kernel that replaces PyTorch's own now, if any."""
    known = hasattr(fused_attention, "current_flash_attention_impl")
    return fused_attention.current_flash_attention_impl() if known else None
