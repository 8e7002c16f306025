"""Continues a prompt with a trained model, decoding through the cache of its attention.

python sample.py "def solve("                     # the newest run; streams the text
python sample.py --run runs/NAME --max-new-tokens 300 --top-k 50 --seed 7 --stats
python sample.py --prompt-file a.py --num-samples 4 --json
python sample.py --interactive
python sample.py --score a.py                     # how well the model predicts a text
python sample.py --score a.py --tokens --html a.html   # and each token of it, in colors too
python sample.py "def f(x):" --attention-map a.png
"""

import sys

if __name__ == "__main__":
    from common import process

    process.start()

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import one_line_errors
from common.errors import NotFinite, UserError
from generation.options import parse_arguments

if TYPE_CHECKING:
    import torch

    from data.tokenizers.base import Tokenizer
    from generation.compiled_step import CompiledStep
    from generation.sampler import Sampler
    from generation.scoring import TokenScore
    from generation.state import GenerationState
    from model.transformer import TransformerLM

# torch, and all that needs it, is imported within functions: --help answers before it would have loaded.


@dataclass(frozen=True)
class LoadedRun:
    folder: Path
    model: "TransformerLM"
    tokenizer: "Tokenizer"
    compiled: "CompiledStep | None" = None

    @property
    def context_length(self) -> int:
        return self.model.config.context_length


def sample(args: argparse.Namespace) -> None:
    run = load(args)
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    if args.score is not None:
        score(args, run)
    elif args.attention_map is not None:
        attention_map(args, run)
    elif args.interactive:
        chat(args, run)
    else:
        generate(args, run)


def load(args: argparse.Namespace) -> LoadedRun:
    """Load the model and the tokenizer of the run that was asked for, or of the newest one."""
    import logging

    from common import process
    from common.console import to_stderr
    from generation.compiled_step import check_compiler
    from model.decode_layout import lay_out_for_decoding
    from runtime.device import choose_device
    from runtime.precision import MixedPrecision, choose_precision
    from training.run.folder import newest
    from training.run.load import load_run
    from training.run.parts import load_choice

    process.end_by_unwinding()  # what takes seconds to import is imported
    to_stderr()
    device = choose_device(args.device)
    if args.compile:
        check_compiler(device)
    precision = "fp32" if args.precision == "auto" and device.type == "cpu" else args.precision
    folder = args.run or newest(with_checkpoint=True)
    kernel = load_choice("kernel", args.kernel)
    model, tokenizer = load_run(folder, device, args.checkpoint, kernel=kernel, execution=args.execution)
    if args.speculate == "self" and model.mtp is None:
        raise UserError(
            f"--speculate self: the model of {folder} has no module that drafts: train one with model.mtp_depth=1, or "
            "choose --speculate lookup"
        )
    model = MixedPrecision(model, choose_precision(precision, device)).model
    lay_out_for_decoding(model, args.num_samples)
    if not args.stats:
        logging.getLogger("headroom").setLevel(logging.WARNING)  # which kernel runs is a matter of speed
    return LoadedRun(folder, model, tokenizer, compiled_step(args, device, model.config.context_length))


def compiled_step(args: argparse.Namespace, device: "torch.device", context_length: int) -> "CompiledStep | None":
    """The compiled decode step, where it was asked for. A conversation may fill the context."""
    if not args.compile:
        return None
    from generation.compiled_step import CompiledStep

    return CompiledStep(context_length if args.interactive else args.max_new_tokens, device)


def announce(run: LoadedRun) -> None:
    """Say which run this is, and that one has to wait."""
    from common.streams import print_stderr

    print_stderr(f"run {run.folder}")
    if run.compiled is not None:
        print_stderr("[--compile: up to a minute behind the first token]")


def generate(args: argparse.Namespace, run: LoadedRun) -> None:
    """Continue the prompt: stream the text, or print a JSON object for each sample."""
    from common.console import deferred_logging
    from common.streams import print_stderr
    from generation.batch_writer import (
        Sample,
        check_finished,
        decode_seconds,
        print_json_samples,
        print_stats,
        share_of_floor,
        show_samples,
        write,
    )
    from generation.compiled_step import offer
    from generation.prompt import encode_prompt

    prompt = encode_prompt(run.tokenizer, args.prompt, run.context_length, args.context == "slide")
    announce(run)
    state = new_state(args, run, prompt)
    num_read = int(state.rows.lengths[0])
    if num_read < len(prompt):
        print_stderr(
            f"[the context of {run.context_length} tokens keeps the last {num_read} of the prompt's {len(prompt)}]"
        )
    samples = [Sample(seed, num_read, run.tokenizer, args.stop) for seed in seeds(args)]
    pieces = write(run.model, run.tokenizer, sampler(args), state, samples, args.max_new_tokens)
    with deferred_logging():
        if args.json:
            print_json_samples(args.prompt, pieces, samples)
        else:
            show_samples(args.prompt, pieces, samples, run.context_length)
    if run.compiled is None and state.caches is not None and args.kernel != "flex":
        share = functools.partial(share_of_floor, run.model, state, samples)
        offer(decode_seconds(samples), share, bool(state.flat), state.tokens.device)
    if state.speculation is not None and (remark := state.speculation.remark()):
        print_stderr(f"[{remark}]")
    if args.stats:
        print_stats(run.model, samples, state)
    check_finished(samples)


def chat(args: argparse.Namespace, run: LoadedRun) -> None:
    """Continue what the user types, turn by turn."""
    from generation.repl import Conversation, converse

    announce(run)
    conversation = Conversation(
        run.model,
        run.tokenizer,
        sampler(args),
        new_state=lambda tokens: new_state(args, run, tokens),
        max_new_tokens=args.max_new_tokens,
        stops=args.stop,
    )
    converse(conversation, args.prompt)


def score(args: argparse.Namespace, run: LoadedRun) -> None:
    """Print how well the model predicts a text: each token where that was asked for, and the whole."""
    from common.streams import json_line, print_stderr
    from generation.score_lines import as_json, as_line
    from generation.score_page import ScorePage
    from generation.scoring import check_finite, score_text

    page = ScorePage(run.tokenizer) if args.html is not None else None
    watchers = [token_printer(args, run)] if args.tokens else []
    watchers += [page.add] if page is not None else []
    begin = partial(announce, run)
    found = score_text(run.model, run.tokenizer, args.score_text, run.context_length, watchers, begin)
    if args.json:
        print(json_line({"file": str(args.score), **as_json(found)}), flush=True)
    check_finite(found, run.model, run.tokenizer, args.score_text, run.context_length)
    if not args.json:
        print(as_line(found))
    if page is not None:
        name = "stdin" if str(args.score) == "-" else args.score
        page.write(args.html, f"{name} as {run.folder} predicts it", as_line(found))
        print_stderr(f"page {args.html}")


def token_printer(args: argparse.Namespace, run: LoadedRun) -> Callable[["list[TokenScore]"], None]:
    """A function that prints tokens as they are scored: as JSON objects, or as lines of one table."""
    from common.streams import json_line
    from generation.score_lines import TokenLines

    lines = TokenLines(run.tokenizer)

    def print_tokens(scores: "list[TokenScore]") -> None:
        for line in map(json_line, lines.json(scores)) if args.json else lines.table(scores):
            print(line)

    return print_tokens


def attention_map(args: argparse.Namespace, run: LoadedRun) -> None:
    """Draw the attention within the prompt."""
    from common.streams import print_stderr
    from generation.attention_map import draw_attention

    draw_attention(run.model, run.tokenizer, args.prompt, args.attention_map, run.folder.resolve().name)
    print_stderr(f"run {run.folder}: {args.attention_map}")


def sampler(args: argparse.Namespace) -> "Sampler":
    from generation.sampler import Sampler

    return Sampler(**{name: getattr(args, name) for name in Sampler.model_fields})


def seeds(args: argparse.Namespace) -> range:
    """The seed of each sample."""
    return range(args.seed, args.seed + args.num_samples)


def new_state(args: argparse.Namespace, run: LoadedRun, prompt: list[int]) -> "GenerationState":
    """The prompt once for each sample, nothing in the KV caches yet."""
    from generation.self_speculation import SelfSpeculation
    from generation.speculative import Speculation
    from generation.state import GenerationState

    rows = [prompt] * args.num_samples
    options = {"cached": not args.no_cache, "slide": args.context == "slide", "compiled": run.compiled}
    state = GenerationState(run.model, rows, seeds(args), **options)
    if args.speculate == "lookup":
        state.speculation = Speculation(len(rows))
    elif args.speculate == "self":
        state.speculation = SelfSpeculation(run.model, len(rows))
    return state


def main() -> None:
    with one_line_errors():
        try:
            sample(parse_arguments(__doc__))
        except NotFinite as error:
            raise UserError(f"{error}: try --checkpoint best, or --precision fp32") from None


if __name__ == "__main__":
    main()
