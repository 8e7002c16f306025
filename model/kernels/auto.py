"""Kernel auto: selects a kernel by device, dtype, shape and whether gradients are needed."""

import functools
import logging

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from common.errors import Unsupported
from model.kernels.base import Attended, Case, How, Kernel, say_once, unannounced
from model.kernels.matmul import Matmul
from model.kernels.naive import Naive
from model.kernels.online import Online
from model.kernels.sdpa import SDPA
from model.kernels.tiles import Tiles
from model.mask import CAUSAL, Mask, Pattern

SDPA_DEFAULT = SDPA()
MATMUL = Matmul()
ONLINE = Online()
TILES = Tiles()
FALLBACK = Naive()
# Beyond, kernel=matmul is still no slower, but the weights it saves outgrow all other activations.
MAX_MATMUL_KEYS = 512
# Masks under which kernel=tiles was the faster one to train with, at 4,096 tokens in float32 (benchmarks/README.md). Of
# shorter texts, and without gradients, it is taken for the same results in training and evaluation, not measured.
SKIPPED = ("patterned", "documents")
TRIAL_TOKENS = 8
TRIAL_ERROR = {torch.float32: 1e-3}  # relative to the largest number; of lower precisions, 0.05


class Auto(Kernel):
    """Uses the fused kernel; on a CPU kernel=matmul if it is faster or the fused one cannot drop weights, and
    kernel=tiles where patterns or documents hide keys; another one if the fused one lacks the log-sum-exp that
    is asked for; and with a warning the naive one, if this device or shape has no fused kernel, or it fails a trial."""

    is_flash_on_cpu = True

    tiles: bool = True  # whether it takes kernel=tiles; runs older than that go on without, to the same bits

    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        if device.type == "cuda":
            SDPA_DEFAULT.check(device, training, dropout)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        case, few_keys = Case.of(q, k, v, mask, how), k.shape[1] <= MAX_MATMUL_KEYS
        choose = _compiled if torch.compiler.is_compiling() else tried
        kernel, warning = choose(case, few_keys, self.tiles)
        if warning:
            say_once(logging.WARNING, warning)
        try:
            return kernel.run(case, q, k, v, mask, how)
        except Unsupported as error:
            say_once(logging.WARNING, slow(error))
            return FALLBACK(q, k, v, mask, how)


def _compiled(case: Case, few_keys: bool, takes_tiles: bool) -> tuple[Kernel, str]:
    """Without a trial."""
    return preferred(case, few_keys, takes_tiles), ""


def preferred(case: Case, few_keys: bool, takes_tiles: bool) -> Kernel:
    """Choose the kernel that auto tries first, as measured (benchmarks/README.md): on a CPU the fused kernel is slow to
    train in bfloat16, has no dropout, and computes what random blocks, global tokens, a dilation or documents hide."""
    if case.device == "cpu":
        short = case.trains and case.dtype == torch.bfloat16 and few_keys
        if short or case.dropout:
            return MATMUL
        return TILES if takes_tiles and case.mask in SKIPPED else SDPA_DEFAULT
    if case.lse and not SDPA_DEFAULT.gives_lse(case.device):
        return MATMUL if few_keys or case.dropout else ONLINE
    return SDPA_DEFAULT


@functools.cache
def tried(case: Case, few_keys: bool, takes_tiles: bool) -> tuple[Kernel, str]:
    """The preferred kernel after a trial, and no warning; or the fallback and a warning that says why."""
    kernel = preferred(case, few_keys, takes_tiles)
    try:
        # Whoever counts memory or operations, or saves tensors to recompute them, shall see those of the run alone.
        with unannounced(), _disable_current_modes(), saved_tensors_hooks(_unchanged, _unchanged):
            _try(kernel, case)
    except Unsupported as error:
        return FALLBACK, slow(error)
    return kernel, ""


def _unchanged(x: Tensor) -> Tensor:
    return x


def slow(reason: Exception) -> str:
    return f"kernel auto takes the slow naive kernel: {reason}"


def _try(kernel: Kernel, case: Case) -> None:
    """Run a kernel on a few made-up tokens, and backward where that is what it is for. Leaves generators as they were.
    Raises Unsupported if it does not run, or computes something else than the naive kernel."""
    given, how = _made_up(case)
    devices = [torch.cuda.current_device()] if case.device == "cuda" else []
    exact = torch.autocast(case.device, enabled=False)  # the tensors have the dtype that is asked about
    with torch.random.fork_rng(devices), torch.set_grad_enabled(case.trains), exact:
        try:
            found = _computed(kernel, *given, how)
        except torch.OutOfMemoryError:
            raise  # says nothing about the kernel
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise Unsupported(f"{type(kernel).__name__} does not run on {case.device}: {reason}") from None
        if not case.dropout:  # else each draws weights of its own to drop
            _compare(kernel, found, _computed(FALLBACK, *given, how))


def _made_up(case: Case) -> tuple[tuple[Tensor, Tensor, Tensor, Mask], How]:
    """A call of this case: q, k, v and the mask; and how to attend."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, TRIAL_TOKENS, heads, dim, generator=draw).to(case.device, case.dtype).requires_grad_(case.trains)
        for heads, dim in (
            (case.n_heads, case.key_dim),
            (case.n_kv_heads, case.key_dim),
            (case.n_kv_heads, case.v_dim),
        )
    )
    positions = torch.arange(TRIAL_TOKENS, device=case.device)[None]
    contiguous = case.mask in ("causal", "patterned")
    pattern = Pattern(window=TRIAL_TOKENS // 2) if case.mask == "patterned" else CAUSAL
    if case.mask == "documents":
        docs, positions = positions // (TRIAL_TOKENS // 2), positions % (TRIAL_TOKENS // 2)
        mask = Mask(positions, positions, contiguous, pattern, docs, docs)
    else:
        mask = Mask(positions, positions, contiguous, pattern)
    return (q, k, v, mask), How(case.key_dim**-0.5, 0.1 if case.dropout else 0.0, case.lse)


def _computed(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Mask, how: How) -> dict[str, Tensor]:
    """What a kernel computes, by name: the output, the log-sum-exp if wanted, and where gradients are needed those of
    both together."""
    attended = kernel(q, k, v, mask, how)
    results = {"outputs": attended.out, "log-sum-exps": attended.lse} if how.lse else {"outputs": attended.out}
    if not torch.is_grad_enabled():
        return results
    # weighted, and differently: the sum of all would hide a gradient that is another query's or column's
    loss = sum((x.float() * torch.arange(x.numel(), device=x.device).cos().view_as(x)).sum() for x in results.values())
    names = ("gradients of queries", "gradients of keys", "gradients of values")
    return results | dict(zip(names, torch.autograd.grad(loss, (q, k, v), materialize_grads=True), strict=True))


def _compare(kernel: Kernel, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise Unsupported where a result differs by more than rounding."""
    bound = TRIAL_ERROR.get(expected["outputs"].dtype, 0.05)
    for name, exact in expected.items():
        exact = exact.detach().float()
        error = float((found[name].detach().float() - exact).abs().max() / exact.abs().max())
        if not error <= bound:
            raise Unsupported(f"{type(kernel).__name__} computes other {name}, by {error:.1g} of the largest number")
