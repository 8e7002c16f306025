"""What a GPU does with this program: every kernel held against the naive one in bfloat16, training throughput and MFU,
memory predicted and measured, decoding. Each section ends within nine minutes and writes each row when it has it.

python -m benchmarks.gpu kernels --out results.jsonl
python -m benchmarks.gpu training decoding --out results.jsonl     # and: memory
python -m benchmarks.gpu --cpu                                     # all of it in small, to see that it runs

Needs torch, pydantic, PyYAML and numpy; neither hydra nor a corpus: the tokens are made up.
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
import yaml

from benchmarks.side_by_side import environment
from model import cost
from model.errors import Unsupported
from model.generate import Texts, generate
from model.kernels.auto import Auto
from model.kernels.base import Kernel
from model.kernels.flex import Flex
from model.kernels.naive import Naive
from model.kernels.online import Online
from model.kernels.sdpa import SDPA
from model.mask import Mask, Pattern
from model.sampler import Sampler
from model.transformer import ModelConfig, TransformerLM
from training.compilation import maybe_compiled
from training.config import ROOT, load_choice
from training.mfu import peak_flops
from training.precision import Working
from training.step import mean_loss, train_step

DEADLINE = 8 * 60  # seconds of a section; what is left is named and not run
VOCAB = 50257
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", help=f"of {', '.join(SECTIONS)}; unset: all")
    parser.add_argument("--out", type=Path, help="a row of JSON is added for each measurement")
    parser.add_argument("--cpu", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args()
    unknown = set(args.section) - SECTIONS.keys()
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here: --cpu runs the same in small")
    if args.cpu:
        scale = Scale(torch.device("cpu"), ("tiny",), 2, 160, 2, compiled=False)
    else:
        scale = Scale(torch.device("cuda"), ("gpt2", "gpt2_medium"), 16, 4096, 10, compiled=True)
    say({"section": "environment", **environment()}, args.out)
    for name in args.section or SECTIONS:
        start = time.perf_counter()
        for row in SECTIONS[name](scale):
            say({"section": name, **row}, args.out)
            if time.perf_counter() - start > DEADLINE:
                say({"section": name, "stopped": f"after {DEADLINE} s: the rest was not run"}, args.out)
                break


def say(row: Row, out: Path | None) -> None:
    print(json.dumps(row), flush=True)
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def kernels(scale: Scale) -> Iterator[Row]:
    """Forward and gradients in bfloat16 against the naive kernel in float32, and the time of both passes."""
    candidates = {"sdpa": SDPA(), "online": Online(), "flex": Flex(), "auto": Auto()}
    positions = torch.arange(scale.tokens, device=scale.device)[None]
    third = scale.tokens // 3
    documents = positions // third
    masks = {
        "causal": Mask(positions, positions, plain=True),
        "window": Mask(positions, positions, plain=True, pattern=Pattern(window=scale.tokens // 8)),
        "documents": Mask(positions % third, positions % third, plain=False, q_doc=documents, k_doc=documents),
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
                try:
                    found = both_passes(kernel, q, k, v, mask)
                except Unsupported as refusal:
                    yield row | {"refused": str(refusal)}
                    continue
                errors = [
                    float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
                ]
                seconds = timed(lambda: both_passes(kernel, q, k, v, mask), scale)  # noqa: B023 - called before the next
                yield row | {"error": max(errors), "within": max(errors) <= 0.03, "ms": 1e3 * seconds}


def training(scale: Scale) -> Iterator[Row]:
    """Tokens per second and MFU of whole steps: AdamW, bfloat16, made-up tokens."""
    for size in scale.sizes:
        for attention in ATTENTIONS:
            yield _trained(scale, size, attention)


def memory(scale: Scale) -> Iterator[Row]:
    """The peak that the meta device predicts for a micro-batch, and what the device's allocator saw."""
    for size in scale.sizes:
        for attention in ATTENTIONS:
            config, row = config_of(size, attention), {"size": size, "attention": attention}
            predicted = _predicted(config, scale)
            if scale.device.type != "cuda":
                yield row | {"predicted_mb": predicted / 1e6}
                continue
            working, batch = Working(TransformerLM(config, VOCAB).to(scale.device), "bf16"), _batch(config, scale)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            working.backward(mean_loss(working.model, *batch))
            measured = torch.cuda.max_memory_allocated() - before
            yield row | {"predicted_mb": predicted / 1e6, "measured_mb": measured / 1e6, "ratio": predicted / measured}


def decoding(scale: Scale) -> Iterator[Row]:
    """Tokens per second through the cache, greedy, bfloat16 weights, prompts of 64."""
    for size in scale.sizes:
        for attention in ATTENTIONS:
            model = TransformerLM(config_of(size, attention), VOCAB).to(scale.device)
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.data = parameter.data.bfloat16()
            for rows in (1, 8):
                count = 4 + 4 * scale.steps

                def write(rows: int = rows, count: int = count, model: TransformerLM = model) -> None:
                    texts = Texts(model, [list(range(1, 65))] * rows, seeds=list(range(rows)))
                    for _ in generate(model, texts, Sampler(temperature=0), max_new_tokens=count):
                        pass

                seconds = timed(write, scale)
                held = cost.cache_bytes_per_token(model)
                yield {
                    "size": size,
                    "attention": attention,
                    "texts": rows,
                    "tokens_per_second": rows * count / seconds,
                    "cache_bytes_per_token": held,
                }


def config_of(size: str, attention: str) -> ModelConfig:
    dims = yaml.safe_load((ROOT / "conf" / "model" / f"{size}.yaml").read_text())
    dims.pop("defaults", None)
    parts = {"attention": load_choice("attention", attention), "mlp": load_choice("mlp", "relu2"), "kernel": Auto()}
    return ModelConfig(**dims, **parts)


def both_passes(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = kernel(*leaves, mask, q.shape[-1] ** -0.5)
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


def _trained(scale: Scale, size: str, attention: str) -> Row:
    config = config_of(size, attention)
    model = TransformerLM(config, VOCAB).to(scale.device)
    working = Working(model, "bf16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss, batch = maybe_compiled(mean_loss, scale.compiled), _batch(config, scale)
    for _ in range(scale.steps):
        result = train_step(working, optimizer, [batch], 1e-4, 1.0, (0, 0), loss)
    _wait(scale)
    start = time.perf_counter()
    for _ in range(scale.steps):
        result = train_step(working, optimizer, [batch], 1e-4, 1.0, (0, 0), loss)
    _wait(scale)
    speed = scale.steps * batch[0].numel() / (time.perf_counter() - start)
    peak, flops = peak_flops(scale.device, "bf16", None), cost.flops(config, VOCAB).training()
    return {
        "size": size,
        "attention": attention,
        "micro_batch": list(batch[0].shape),
        "compiled": scale.compiled,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_is_finite": math.isfinite(float(result.loss)),
        "tokens_per_second": speed,
        "mfu": speed * flops / peak if peak else None,
    }


def _predicted(config: ModelConfig, scale: Scale) -> int:
    working = Working(cost.on_meta(config, VOCAB), "bf16")
    tokens = torch.zeros(scale.micro_batch, config.context_length, dtype=torch.int64, device="meta")
    with cost.LivePeak() as live:
        working.backward(mean_loss(working.model, tokens, tokens))
    return live.bytes


def _batch(config: ModelConfig, scale: Scale) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCAB, (scale.micro_batch, config.context_length + 1), device=scale.device)
    return tokens[:, :-1], tokens[:, 1:]


def _wait(scale: Scale) -> None:
    if scale.device.type == "cuda":
        torch.cuda.synchronize()


SECTIONS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    "kernels": kernels,
    "training": training,
    "memory": memory,
    "decoding": decoding,
}

if __name__ == "__main__":
    main()
