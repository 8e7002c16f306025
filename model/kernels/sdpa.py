"""PyTorch's fused attention: flash, memory-efficient or cuDNN, never its unfused math fallback."""

import importlib
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, Self

import torch
import torch.nn.attention as fused_attention
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from common.errors import Unsupported
from model.kernels.base import Attended, Case, How, Kernel, announce, check_drops_nothing, group_queries
from model.kernels.online import tiles
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
DEVICES = ("cpu", "cuda")  # that have fused kernels
CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
CPU_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
QUERY_TILE = 256  # queries whose mask is in memory at one time
MAX_MASK = 2**21  # elements of it, for each sequence: fewer queries where there are more than 8,192 keys and heads
MAX_SAVED_MASK_KEYS = 1024  # width up to which a tile's mask is saved for the backward pass


class SDPA(Kernel):
    """torch.nn.functional.scaled_dot_product_attention, restricted to its fused backends."""

    is_flash_on_cpu = True

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
        check_drops_nothing("sdpa", dropout and device.type == "cpu", " on a CPU")

    def gives_lse(self, device: str) -> bool:
        return device == "cpu"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        return self.run(Case.of(q, k, v, mask, how), q, k, v, mask, how)

    def run(self, case: Case, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        fused = self._fused(q.device, case)
        # Fused kernels need q, k and v equally wide. Zero columns change neither scores (the scale is explicit) nor the
        # output columns that are returned; nor do the columns of keys that stand behind their values.
        width = max(case.key_dim, case.v_dim)
        q, k = widened(q, width), widened(k, width)
        v = k if how.v_dim is not None else widened(v, width)
        attend = _causal if mask.is_plain_causal else by_positions if q.shape[1] > 1 or case.trains else _of_one_query
        out, lse = attend(q, k, v, mask, how, fused)
        announce(f"sdpa ({fused.ran})", case)
        return Attended(out if case.v_dim == width else out[..., : case.v_dim], lse)

    def _fused(self, device: torch.device, case: Case) -> "Fused":
        """The fused function for such calls. Raises Unsupported if there is none."""
        self.check(device, case.trains, case.dropout)
        if case.device == "cpu":
            return FLASH_ON_CPU
        self.check_lse(case)
        _activate(self.flash)
        return FusedSDPA(self.backend if case.mask == "causal" and case.dtype != torch.float32 else None)


def widened(x: Tensor, width: int) -> Tensor:
    """Pad the last dimension with zeros to `width`."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Mask, how: How, fused: "Fused") -> Attended:
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.device.type == "cuda" and q.dtype == torch.float32:
        # in float32 only the memory-efficient kernel runs, which does not support grouped heads
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        grouped = False
    out, lse = fused(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), how, is_causal=True, enable_gqa=grouped)
    return Attended(out.transpose(1, 2), lse if lse is None else lse.transpose(1, 2))


def _of_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Mask, how: How, fused: "Fused") -> Attended:
    """by_positions for T = 1 without gradients, in the fewest operations."""
    batch, _, heads, dim = q.shape
    rows = q.reshape(batch, k.shape[2], -1, dim)  # the query heads of a KV head
    bias = mask.bias(slice(0, 1), slice(0, k.shape[1]), q.dtype)[:, None]
    out, lse = fused(rows, k.transpose(1, 2), v.transpose(1, 2), how, attn_mask=bias)
    return Attended(out.reshape(batch, 1, heads, -1), None if lse is None else lse.reshape(batch, 1, heads))


def by_positions(q: Tensor, k: Tensor, v: Tensor, mask: Mask, how: How, fused: "Fused") -> Attended:
    """Attention under a mask from positions, a tile of queries at a time against the span of keys they may see.

    With a window, neither memory nor time grows as T × S. Without one memory does not either: a mask wider than
    MAX_SAVED_MASK_KEYS is not saved for the backward pass, which recomputes the tile.

    The query heads that share a KV head become rows of one head, so keys are read once and never repeated.
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, S, D)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))

    def tile(q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice) -> Attended:
        t, repeats = q.shape[1], q.shape[2] // k.shape[1]
        bias = mask.bias(rows, keys, q.dtype, repeats)[:, None]  # (B or 1, 1, t·R, s)
        out, lse = fused(_rows_of_key_heads(q, k.shape[1]), k, v, how, attn_mask=bias)
        return Attended(_by_token(out, t), None if lse is None else _by_token(lse[..., None], t).squeeze(-1))

    def run(rows: slice) -> Attended:
        keys = mask.span(rows)
        inputs = q[:, rows], k[:, :, keys], v[:, :, keys], rows, keys
        if trains and keys.stop - keys.start > MAX_SAVED_MASK_KEYS:
            return checkpoint(tile, *inputs, use_reentrant=False, preserve_rng_state=how.dropout > 0)
        return tile(*inputs)

    repeats = q.shape[2] // k.shape[1]
    size = min(QUERY_TILE, max(1, MAX_MASK // (k.shape[2] * repeats)))
    found = [run(rows) for rows in tiles(slice(0, q.shape[1]), size)]
    if len(found) == 1:
        return found[0]
    return Attended(*(None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))


def _rows_of_key_heads(q: Tensor, n_kv_heads: int) -> Tensor:
    """(B, t, H, D) -> (B, G, t·R, D)."""
    return group_queries(q, n_kv_heads).permute(0, 2, 1, 3, 4).flatten(2, 3)


def _by_token(x: Tensor, t: int) -> Tensor:
    """Inverse of _rows_of_key_heads: (B, G, t·R, D) -> (B, t, H, D)."""
    return x.unflatten(2, (t, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)


class Fused(Protocol):
    """A fused kernel of PyTorch: q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D), and the log-sum-exp (B, H, T) if
    wanted. options: is_causal, enable_gqa and attn_mask, as of F.scaled_dot_product_attention."""

    ran: str  # name of the backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, how: How, **options: Any) -> tuple[Tensor, Tensor | None]: ...


class FlashOnCPU:
    """The one fused kernel of a CPU, without the dispatcher of F.scaled_dot_product_attention, which finds it too."""

    ran = "flash"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        how: How,
        *,
        is_causal: bool = False,
        attn_mask: Tensor | None = None,
        **_grouped: bool,  # enable_gqa: it always does
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the operator itself does not look
        if how.lse and torch.is_grad_enabled():
            return _FlashWithLSE.apply(q, k, v, attn_mask, is_causal, how.scale)
        out, lse = CPU_FLASH(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=how.scale)
        return out, lse if how.lse else None


FLASH_ON_CPU = FlashOnCPU()


def attend_to_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """FLASH_ON_CPU without a mask or gradients: q (B, G, R, D), k and v (B, G, S, D) -> (B, G, R, D)."""
    return CPU_FLASH(q, k, v, 0.0, False, scale=scale)[0]


class _FlashWithLSE(torch.autograd.Function):
    """The CPU's flash kernel, with the gradient of its log-sum-exp L, which PyTorch leaves out."""

    @staticmethod
    def forward(  # noqa: PLR0913 (ctx is as self)
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = CPU_FLASH(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse, bias)
        ctx.is_causal, ctx.scale = is_causal, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, bias = ctx.saved_tensors
        width = q.shape[-1]
        d_out, q, k, v, out = with_gradient_of_lse(d_out, d_lse, q, k, v, out)
        gradients = CPU_FLASH_BACKWARD(d_out, q, k, v, out, lse, 0.0, ctx.is_causal, attn_mask=bias, scale=ctx.scale)
        return *(grad[..., :width] for grad in gradients), None, None, None


def with_gradient_of_lse(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, ...]:
    """Return dO, Q, K, V and O with one more column, by which the flash kernel's backward pass takes in the gradient dL
    of the log-sum-exp. It computes dX = P ∘ (dO Vᵀ - D) with D = rowsum(dO ∘ O), and dL/dX = P asks for D - dL in place
    of D. So O, dO and V get a column of -1, dL and 0 (Q and K too, of 0: it wants equal widths), which adds -dL to D
    and nothing to dO Vᵀ."""
    width = q.shape[-1] + 1
    d_out = torch.cat((d_out, d_lse[..., None].to(d_out.dtype)), -1)
    return d_out, widened(q, width), widened(k, width), widened(v, width), F.pad(out, (0, 1), value=-1.0)


class FusedSDPA:
    """F.scaled_dot_product_attention with fused backends only; `ran` names the one that ran."""

    ran = "fused"

    def __init__(self, backend: str | None):
        self.backend = backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, how: How, **options: Any) -> tuple[Tensor, None]:
        """Raises Unsupported where PyTorch would silently take its slow math path."""
        options |= {"scale": how.scale, "dropout_p": how.dropout}
        try:
            with _allowed(self.backend):
                if not torch.compiler.is_compiling():  # setting an attribute breaks the trace of a recomputed tile
                    self.ran = _chosen(q, k, v, options)
                return F.scaled_dot_product_attention(q, k, v, **options), None
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


class _NoMath:
    """Within its `with` block PyTorch has fused kernels only. Says what sdpa_kernel(BACKENDS) says in a tenth of the
    time, which in decoding is that of an operation."""

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.math_sdp_enabled()
        torch.backends.cuda.enable_math_sdp(False)

    def __exit__(self, *_) -> None:
        torch.backends.cuda.enable_math_sdp(self.before)


def _allowed(backend: str | None) -> AbstractContextManager:
    """Restrict PyTorch to that backend, or to all that are fused."""
    if backend is None and not torch.compiler.is_compiling():
        return _NoMath()
    return sdpa_kernel(list(BACKENDS.values()) if backend is None else [BACKENDS[backend]])


def _chosen(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> str:
    """Name the backend that PyTorch chooses for this call; "fused" if it does not tell."""
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
