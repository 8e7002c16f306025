"""What a GPU does with this program: every kernel held against the naive one in bfloat16, training throughput and MFU,
memory predicted and measured, decoding. Each section ends within nine minutes and writes each row when it has it.

python -m benchmarks.gpu kernels --out results.jsonl
python -m benchmarks.gpu training training_350m --nanogpt ../nanoGPT --out results.jsonl
python -m benchmarks.gpu variants memory --out results.jsonl
python -m benchmarks.gpu decoding executions long_prompts --out results.jsonl
python -m benchmarks.gpu --cpu                                     # all of it in small, to see that it runs
python -m benchmarks.gpu --smoke --out smoke.jsonl                 # first: does the program work here, in four minutes

    kernels         error of output and gradients, and the time of both passes, of every kernel that the device has
    training        124M, compiled: tokens per second, MFU, peak memory of MHA, GQA, MLA, and of nanoGPT if it is given
    training_350m   the same at 350M
    variants        124M with float8, autotuning, cuDNN, FlashAttention 3 and 4, as far as they are there
    memory          of one micro-batch, predicted and measured
    decoding        time to the first token, and from token to token: eager, and compiled into CUDA graphs
    executions      the same after long contexts: MLA absorbed, expanded, and with all heads cached, beside MHA and GQA
    long_prompts    time and peak memory of the pass over 32k tokens

What cannot run is a row that says why. Needs torch, pydantic, hydra-core and numpy; no corpus: the tokens are made up.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import gpu_decoding
from benchmarks.nanogpt import autocast_step, nanogpt_of
from benchmarks.side_by_side import Announced, checkout, environment, output
from common.cli import Parser, one_line_errors
from common.errors import Unsupported, UserError
from data.batches import Batch
from model import cost
from model.kernels.auto import Auto
from model.kernels.base import How, Kernel
from model.kernels.flex import Flex
from model.kernels.matmul import Matmul
from model.kernels.naive import Naive
from model.kernels.online import Online
from model.kernels.sdpa import BACKENDS, PACKAGES, SDPA
from model.mask import CAUSAL, Mask, Pattern
from model.transformer import ModelConfig, TransformerLM
from runtime.memory import PeakTensorBytes
from runtime.precision import choose_precision
from training.losses import mean_loss
from training.monitor.mfu import peak_flops
from training.run.config import Run, compose
from training.state import TrainState
from training.step import train_step
from training.step_memory import traceable

DEADLINE = 8.5 * 60  # seconds of a section: a row that may take longer than is left of them is not begun
VOCAB, PADDED_VOCAB = 50257, 50304  # ours pads what it multiplies by; nanoGPT is given the padded number
ATTENTIONS = ("mha", "gqa", "mla")
Row = dict[str, Any]


class Scale(NamedTuple):
    """How much is asked of the machine."""

    device: torch.device
    sizes: tuple[str, ...]  # of conf/model
    micro_batch: int
    tokens: int  # of kernels' sequences
    steps: int  # timed, after as many to warm up
    compiled: bool
    nanogpt: Path | None  # a checkout


def main() -> None:
    parser = Parser(prog="-m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", help=f"of {', '.join(SECTIONS)}; unset: all")
    parser.add_argument("--out", type=output, help="a row of JSON is added for each measurement")
    parser.add_argument("--nanogpt", type=checkout, help="a checkout of nanoGPT: its model.py is imported")
    parser.add_argument("--cpu", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--smoke", action="store_true", help="train, resume, sample, compile (benchmarks/smoke.py)")
    args = parser.parse_args()
    unknown = set(args.section) - SECTIONS.keys()
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here: --cpu runs the same in small")
    parts = {"nanogpt": args.nanogpt, "compiled": not args.cpu}
    if args.cpu:
        scale = Scale(torch.device("cpu"), ("mini", "tiny"), 2, 160, 2, **parts)
    else:
        scale = Scale(torch.device("cuda"), ("gpt2", "gpt2_medium"), 16, 4096, 10, **parts)
    say({"section": "environment", **environment()}, args.out)
    if args.smoke:
        return smoked(scale, args.out)
    for name in args.section or SECTIONS:
        start = last = time.perf_counter()
        longest = 0.0
        for row in SECTIONS[name](scale):
            say({"section": name, **row}, args.out)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
            if now - start + longest > DEADLINE:
                say({"section": name, "stopped": f"after {now - start:.0f} s: the rest was not run"}, args.out)
                break


def smoked(scale: Scale, out: Path | None) -> None:
    """Raises UserError, when all rows are written, where one shows that something does not work here."""
    from benchmarks.smoke import smoke, verdict  # needs more packages than the rest

    start, rows = time.perf_counter(), []
    for row, measure in smoke(scale.device):
        rows.append(attempted(row, measure))
        say({"section": "smoke", **rows[-1]}, out)
    summary = verdict(rows)
    say({"section": "smoke", **summary, "seconds": round(time.perf_counter() - start, 1)}, out)
    if not summary["passed"]:
        raise UserError(f"the smoke test failed: {'; '.join(summary['failures'])}")


def say(row: Row, out: Path | None) -> None:
    print(json.dumps(row), flush=True)
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def kernels(scale: Scale) -> Iterator[Row]:
    """Forward and gradients in bfloat16 against the naive kernel in float32, and the time of both passes."""
    candidates = {
        "naive": Naive(),
        "online": Online(),
        "matmul": Matmul(),
        "flex": Flex(),
        "auto": Auto(),
        "sdpa": SDPA(),
        **{f"sdpa {name}": SDPA(backend=name) for name in BACKENDS},
        **{f"sdpa {name}": SDPA(flash=name) for name in PACKAGES},
    }
    positions = torch.arange(scale.tokens, device=scale.device)[None]
    third = scale.tokens // 3
    documents = positions // third
    masks = {
        "causal": Mask(positions, positions, contiguous=True, pattern=CAUSAL),
        "window": Mask(positions, positions, contiguous=True, pattern=Pattern(window=scale.tokens // 8)),
        "documents": Mask(positions % third, positions % third, False, CAUSAL, documents, documents),
    }
    shapes = {
        "MHA 64": (8, 8, 64, 64),
        "GQA 128": (8, 2, 128, 128),
        "MLA 96 on 64": (8, 8, 96, 64),
        "absorbed 208": (8, 1, 208, 208),
    }
    for shape, (heads, groups, width, value) in shapes.items():
        draw = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(2, scale.tokens, *dims, generator=draw).to(scale.device, torch.bfloat16)
            for dims in ((heads, width), (groups, width), (groups, value))
        )
        for mask_name, mask in masks.items():
            expected = both_passes(Naive(), *(x.float() for x in (q, k, v)), mask)
            for name, kernel in candidates.items():
                row = {"shape": shape, "mask": mask_name, "tokens": scale.tokens, "kernel": name}

                yield attempted(row, _compared, scale, kernel, (q, k, v), mask, expected)


def training(scale: Scale) -> Iterator[Row]:
    """Tokens per second and MFU of whole steps: AdamW, bfloat16, made-up tokens."""
    return _throughput(scale, scale.sizes[0])


def training_350m(scale: Scale) -> Iterator[Row]:
    return _throughput(scale, scale.sizes[1])


def variants(scale: Scale) -> Iterator[Row]:
    """What may make it faster still, each against the same run without it."""
    size = scale.sizes[0]
    kinds: dict[str, dict[str, Any]] = {"bf16": {}, "fp8": {"precision": "fp8"}}
    if scale.compiled:
        kinds |= {"autotune": {"autotune": True}, "fp8, autotune": {"precision": "fp8", "autotune": True}}
    kinds |= {name: {"kernel": SDPA(flash=name)} for name in PACKAGES} | {"cudnn": {"kernel": SDPA(backend="cudnn")}}
    for attention in ("mha", "mla"):
        for kind, how in kinds.items():
            row = {"size": size, "attention": attention, "variant": kind}
            yield attempted(row, _trained, scale, size, attention, **how)


def _throughput(scale: Scale, size: str) -> Iterator[Row]:
    first, *others = ATTENTIONS
    yield attempted({"size": size, "attention": first}, _trained, scale, size, first)
    if scale.nanogpt:
        yield attempted({"size": size, "attention": "nanoGPT"}, _nanogpt, scale, size)
    for attention in others:
        yield attempted({"size": size, "attention": attention}, _trained, scale, size, attention)


def memory(scale: Scale) -> Iterator[Row]:
    """The peak that the meta device predicts for a micro-batch, and what the device's allocator saw."""
    for size in scale.sizes:
        for attention in ATTENTIONS:
            run = compose(f"model={size}", f"attention={attention}", "precision=bf16")
            row = {"size": size, "attention": attention}
            predicted = _predicted(run, scale)
            if scale.device.type != "cuda":
                yield row | {"predicted_mb": predicted / 1e6}
                continue
            state, batch = TrainState.create(run, VOCAB, scale.device), _batch(run.model, scale)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            state.precision.backward(mean_loss(state.precision.model, Batch(*batch))[0])
            measured = torch.cuda.max_memory_allocated() - before
            yield row | {"predicted_mb": predicted / 1e6, "measured_mb": measured / 1e6, "ratio": predicted / measured}


def decoding(scale: Scale) -> Iterator[Row]:
    return _each(gpu_decoding.decoding(_extent(scale)))


def executions(scale: Scale) -> Iterator[Row]:
    return _each(gpu_decoding.executions(_extent(scale)))


def long_prompts(scale: Scale) -> Iterator[Row]:
    return _each(gpu_decoding.long_prompts(_extent(scale)))


def _extent(scale: Scale) -> gpu_decoding.Extent:
    if scale.device.type == "cuda":
        return gpu_decoding.Extent(scale.device, scale.sizes, VOCAB, 64, (1024, 8192, 32768), scale.compiled)
    return gpu_decoding.Extent(scale.device, scale.sizes[:1], 512, 4, (128,), scale.compiled)


def _each(rows: Iterator[gpu_decoding.Measured]) -> Iterator[Row]:
    for row, measure in rows:
        yield attempted(row, measure)


def both_passes(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = kernel(*leaves, mask, How(q.shape[-1] ** -0.5)).out
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def timed(run: Callable[[], Any], scale: Scale) -> float:
    """Median seconds of a call, the device waited for."""
    run()
    seconds = []
    for _ in range(max(3, scale.steps // 2)):
        _wait(scale)
        start = time.perf_counter()
        run()
        _wait(scale)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def attempted(row: Row, measure: Callable[..., Row], *given: Any, **settings: Any) -> Row:
    """The row with what was measured, or with why nothing was: others are worth having then."""
    try:
        return row | measure(*given, **settings)
    except (Unsupported, UserError) as refusal:
        return row | {"refused": str(refusal)}
    except (RuntimeError, ImportError) as error:  # out of memory is one, too
        return row | {"failed": " ".join(str(error).split())[:300]}


def _compared(
    scale: Scale,
    kernel: Kernel,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: Mask,
    expected: list[torch.Tensor],
) -> Row:
    kernel.check(scale.device, training=True, dropout=False)
    with Announced() as announced:
        found = both_passes(kernel, *given, mask)
    errors = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
    seconds = timed(lambda: both_passes(kernel, *given, mask), scale)
    return {"error": max(errors), "within": max(errors) <= 0.03, "ms": 1e3 * seconds, "ran": announced.kernel}


def _trained(
    scale: Scale,
    size: str,
    attention: str,
    precision: str = "bf16",
    autotune: bool = False,
    kernel: Kernel | None = None,
) -> Row:
    precision = choose_precision(precision, scale.device)
    settings = "optim=adamw", "optim.lr=1e-4", f"precision={precision}", f"compile={scale.compiled}"
    run = compose(f"model={size}", f"attention={attention}", *settings, f"autotune={autotune}")
    config = run.model if kernel is None else run.model.model_copy(update={"kernel": kernel})
    config.check_training(scale.device)
    state = TrainState.create(run.model_copy(update={"model": config}), VOCAB, scale.device)
    flops = cost.flops(config, VOCAB).training()
    with Announced() as announced:
        row = _timed_steps(scale, config, lambda *batch: train_step(state, [Batch(*batch)], 1.0).loss)
    row |= {"parameters": sum(p.numel() for p in state.model.parameters()), "precision": precision}
    row |= {"kernel": announced.kernel, "warnings": announced.warnings}
    return row | {"mfu": _mfu(scale, precision, row["tokens_per_second"] * flops)}


def _nanogpt(scale: Scale, size: str) -> Row:
    """Compiled and by autocast, as its train.py has it. Its FLOPs are counted as ours: of MHA in the same shape, whose
    MLP holds as many numbers."""
    config = compose(f"model={size}", "attention=mha").model
    shape = {name: getattr(config, name) for name in ("n_layers", "n_heads", "d_model", "context_length")}
    model, optimizer = nanogpt_of(scale.nanogpt, scale.device, shape | {"vocab": PADDED_VOCAB}, lr=1e-4)
    run = torch.compile(model) if scale.compiled else model
    step = autocast_step(model, optimizer, lambda *batch: run(*batch)[1], scale.device, "bf16")
    row = _timed_steps(scale, config, lambda *batch: step(*(part.contiguous() for part in batch)))
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "precision": "bf16"}
    return row | {"mfu": _mfu(scale, "bf16", row["tokens_per_second"] * cost.flops(config, VOCAB).training())}


def _timed_steps(scale: Scale, config: ModelConfig, step: Callable[..., torch.Tensor]) -> Row:
    batch, start = _batch(config, scale), time.perf_counter()
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step(*batch)
    _wait(scale)
    first = time.perf_counter() - start
    for _ in range(scale.steps):
        loss = step(*batch)
    _wait(scale)
    start = time.perf_counter()
    for _ in range(scale.steps):
        loss = step(*batch)
    _wait(scale)
    speed = scale.steps * batch[0].numel() / (time.perf_counter() - start)
    return {
        "micro_batch": list(batch[0].shape),
        "compiled": scale.compiled,
        "first_step_seconds": first,
        "loss_is_finite": math.isfinite(float(loss)),
        "tokens_per_second": speed,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if scale.device.type == "cuda" else None,
    }


def _mfu(scale: Scale, precision: str, flops_per_second: float) -> float | None:
    peak = peak_flops(scale.device, precision, None)
    return flops_per_second / peak if peak else None


def _predicted(run: Run, scale: Scale) -> int:
    with FakeTensorMode(), scale.device, PeakTensorBytes() as peak:
        precision = TrainState.of(run, TransformerLM(traceable(run.model), VOCAB)).precision
        tokens = torch.zeros(scale.micro_batch, run.model.context_length, dtype=torch.int64)
        precision.backward(mean_loss(precision.model, Batch(tokens, tokens))[0])
    return peak.bytes


def _batch(config: ModelConfig, scale: Scale) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCAB, (scale.micro_batch, config.context_length + 1), device=scale.device)
    return tokens[:, :-1], tokens[:, 1:]


def _wait(scale: Scale) -> None:
    if scale.device.type == "cuda":
        torch.cuda.synchronize()


SECTIONS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    "kernels": kernels,
    "training": training,
    "training_350m": training_350m,
    "variants": variants,
    "memory": memory,
    "decoding": decoding,
    "executions": executions,
    "long_prompts": long_prompts,
}

if __name__ == "__main__":
    with one_line_errors():
        main()
