"""Times training: ours against peers, in turns, at the same shapes, precision, optimizer and work; on made-up tokens.

python -m benchmarks.train                                    # (i) and (ii) in bf16, beside transformers
python -m benchmarks.train --nanogpt ../nanoGPT --sizes i ii iii --precision bf16 fp32 --json train.json

A step is forward, backward, clipping and AdamW on one micro-batch. Peers run as their users run them: bf16 by autocast,
AdamW as they build it. All share one process, so the allocator that training tunes for ours is tuned for them too
(--untuned leaves it to all as it comes). A peer that cannot be imported is skipped.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.litgpt import litgpt_of
from benchmarks.nanogpt import BETAS, CLIP, DECAY, Step, autocast_step, nanogpt_of
from benchmarks.side_by_side import Announced, checkout, count, in_turns, litgpt_checkout, marked, output, report
from common.cli import Parser, one_line_errors
from common.errors import UserError
from data.batches import Batch
from runtime.allocator import keep_buffers
from training.run.composer import merged
from training.run.config import Run, compose
from training.state import TrainState
from training.step import train_step

T = TypeVar("T")
LR = 1e-4
# Settings that recipes which are compared have in common.
SHARED = r"\+*(precision|data|tokenizer|steps|seed|dry_run|resume|init_from|run_dir|model)="
OURS = ("mha", "gqa", "mla")


class Size(NamedTuple):
    n_layers: int
    n_heads: int
    d_model: int
    tokens: int
    batch: int
    vocab: int
    steps: int  # of one turn: short ones together, so that a turn takes about a second

    def __str__(self) -> str:
        return "/".join(map(str, self[:5]))

    @property
    def shape(self) -> dict[str, int]:
        return {
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "d_model": self.d_model,
            "context_length": self.tokens,
            "vocab": self.vocab,
        }


SIZES = {
    "i": Size(4, 4, 128, 64, 12, vocab=65, steps=5),
    "ii": Size(6, 6, 384, 256, 16, vocab=65, steps=1),
    "iii": Size(12, 12, 768, 512, 4, vocab=50304, steps=1),  # GPT-2 124M
}


def main() -> None:
    parser = Parser(
        prog="-m benchmarks.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["i", "ii"])
    parser.add_argument("--precision", nargs="+", choices=["bf16", "fp32"], default=["bf16"])
    parser.add_argument("--nanogpt", type=checkout, help="a checkout of nanoGPT: its model.py is imported")
    parser.add_argument("--litgpt", type=litgpt_checkout, help="a checkout of litgpt; unset: it is installed")
    parser.add_argument("--compiled", action="store_true", help="each model compiled too: a minute more for each")
    parser.add_argument("--only", nargs="+", help="names of models: those alone")
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--untuned", action="store_true", help="leave the allocator as it comes")
    parser.add_argument("--json", type=output, help="write the table there")
    args = parser.parse_args()
    if not args.untuned:
        keep_buffers()
    rows: list[dict[str, Any]] = []
    for size in (SIZES[name] for name in args.sizes):
        for precision in args.precision:
            rows += _timed(args, size, precision)
    report("training, sizes as layers/heads/width/tokens/batch", rows, args.json)


def _timed(args: argparse.Namespace, size: Size, precision: str) -> list[dict[str, Any]]:
    tokens = torch.randint(size.vocab, (size.batch, size.tokens + 1), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    runs, kernels, weights = {}, {}, {}
    candidates = {**_ours(size, precision), **_peers(size, precision, args.nanogpt, args.litgpt)}
    if args.compiled:
        candidates |= _ours(size, precision, compiled=True)
        candidates |= {
            f"{name}, compiled": lambda make=make: _compiled(make)
            for name, make in _peers(size, precision, args.nanogpt, args.litgpt).items()
        }
    for name, model, step in built(candidates, args.only):
        with Announced() as announced:
            step(*batch)
        kernels[name], weights[name] = announced.kernel, sum(p.numel() for p in model.parameters())
        runs[name] = lambda step=step: [step(*batch) for _ in range(size.steps)]
    timings = in_turns(runs, args.rounds)
    first = next(iter(timings.values())).own
    return [
        {
            "size": str(size),
            "precision": precision,
            "model": name,
            "weights": f"{weights[name] / 1e6:.1f}M",
            "tokens/s": round(size.steps * size.batch * size.tokens / timing.median),
            "ms": 1e3 * timing.median / size.steps,
            "+-": 1e3 * timing.spread / size.steps,
            "CPU ms": 1e3 * timing.own / size.steps,
            "x first": timing.own / first,
            "others": marked(timing),
            "kernel": kernels[name],
        }
        for name, timing in timings.items()
    ]


def built(
    makers: Mapping[str, Callable[[], tuple[nn.Module, T]]], only: Sequence[str] | None
) -> Iterator[tuple[str, nn.Module, T]]:
    """The models, all or those named, with what is timed of each. One that cannot be imported is skipped. Raises
    UserError for a name of none."""
    unknown = set(only or ()) - makers.keys()
    if unknown:
        raise UserError(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(makers)}")
    for name, make in makers.items():
        if only and name not in only:
            continue
        try:
            model, run = make()
        except ImportError as error:
            print(f"{name} is skipped: {error}")
            continue
        yield name, model, run


def _ours(size: Size, precision: str, compiled: bool = False) -> dict[str, Callable[[], tuple[nn.Module, Step]]]:
    def make(attention: str) -> tuple[nn.Module, Step]:
        rotated = size.d_model // size.n_heads // 4
        like_its_peer = (
            ("attention.qk_norm=latent", f"attention.qk_rope_head_dim={rotated}") if attention == "mla" else ()
        )
        settings = "optim=adamw", f"optim.lr={LR}", f"clip_norm={CLIP}", f"precision={precision}", f"compile={compiled}"
        run = run_of(size, f"attention={attention}", *like_its_peer, *settings)
        state = TrainState.create(run, size.vocab, torch.device("cpu"))
        return state.model, lambda *batch: train_step(state, [Batch(*batch)], 1.0)

    suffix = ", compiled" if compiled else ""
    return {f"ours {attention}{suffix}": lambda attention=attention: make(attention) for attention in OURS}


def _compiled(make: Callable[[], tuple[nn.Module, Step]]) -> tuple[nn.Module, Step]:
    model, step = make()
    model.compile()
    return model, step


def _peers(
    size: Size, precision: str, nanogpt: Path | None, litgpt: Path | None
) -> dict[str, Callable[[], tuple[nn.Module, Step]]]:
    def stepping(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
        return autocast_step(model, optimizer, loss, torch.device("cpu"), precision)

    def nano() -> tuple[nn.Module, Step]:
        model, optimizer = nanogpt_of(nanogpt, torch.device("cpu"), size.shape, lr=LR)
        return model, stepping(model, optimizer, lambda inputs, targets: model(inputs, targets)[1])

    def hugging(kind: str) -> tuple[nn.Module, Step]:
        model = hugging_model(kind, size).train()
        return model, stepping(model, _adamw(model), _cross_entropy(lambda x: model(x, use_cache=False).logits))

    def lit() -> tuple[nn.Module, Step]:
        model = litgpt_of(litgpt, size.shape)
        return model, stepping(model, _adamw(model), _cross_entropy(model))

    peers = {
        "transformers Llama": lambda: hugging("Llama"),
        "transformers DeepseekV3": lambda: hugging("DeepseekV3"),
        "litgpt": lit,
    }
    return peers if nanogpt is None else {"nanoGPT": nano, **peers}


def hugging_model(kind: str, size: Size) -> nn.Module:
    """A model of transformers at that size: Llama, or DeepseekV3 without experts."""
    import transformers

    head = size.d_model // size.n_heads
    latent = {
        "q_lora_rank": None,
        "kv_lora_rank": size.d_model // 4,
        "qk_nope_head_dim": head - head // 4,
        "qk_rope_head_dim": head // 4,
        "v_head_dim": head,
        "first_k_dense_replace": size.n_layers,
    }
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=size.vocab,
        hidden_size=size.d_model,
        intermediate_size=-(-8 * size.d_model // 96) * 32,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_heads,
        max_position_embeddings=size.tokens,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        **(latent if kind == "DeepseekV3" else {}),
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def run_of(size: Size, *overrides: str) -> Run:
    """Ours at that size; what the overrides say of its shape counts."""
    shape = (
        f"model.n_layers={size.n_layers}",
        f"model.n_heads={size.n_heads}",
        f"model.d_model={size.d_model}",
        f"model.context_length={size.tokens}",
        f"batch_tokens={size.batch * size.tokens}",
    )
    return compose(*merged(*shape, *overrides))


def check_not_shared(overrides: Sequence[str], where: str) -> None:
    """Raises UserError for a setting that recipes which are compared have in common."""
    for override in overrides:
        if re.match(SHARED, override):
            raise UserError(f"{where} {override}: what is compared shares text, size, precision, steps and seeds")


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)


def _cross_entropy(logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda inputs, targets: F.cross_entropy(logits(inputs).float().flatten(0, 1), targets.flatten())


if __name__ == "__main__":
    with one_line_errors():
        main()
