"""Continues a prompt with a trained model, decoding through the cache of its attention.

python sample.py "def solve("                     # the newest run; streams the text
python sample.py --run runs/NAME --max-new-tokens 300 --top-k 50 --seed 7 --stats
python sample.py --prompt-file a.py --num-samples 4 --json
python sample.py --interactive
python sample.py --score a.py                     # how well the model predicts a text
python sample.py "def f(x):" --attention-map a.png
"""

import sys

if __name__ == "__main__":
    from common import process

    process.start()

import argparse

from common.cli import one_line_errors
from common.errors import NotFinite, UserError
from generation.options import arguments

# torch, and all that needs it, is imported inside `sample`: --help answers before it would have loaded.


def sample(args: argparse.Namespace) -> None:
    import logging

    from common import process
    from common.console import deferred_logging, to_stderr
    from common.streams import json_line, print_stderr
    from generation.attention_map import draw_attention
    from generation.batch_writer import Sample, show_samples, speeds, write
    from generation.prompt import prompt_tokens
    from generation.repl import Conversation, converse
    from generation.sampler import Sampler
    from generation.scoring import as_json, as_line, refuse_not_finite, score_text
    from generation.state import GenerationState
    from runtime.device import choose_device
    from runtime.precision import MixedPrecision, choose_precision
    from training.run.config import load_choice
    from training.run.folder import newest
    from training.run.load import load_run

    process.end_by_unwinding()
    to_stderr()
    device = choose_device(args.device)
    precision = "fp32" if args.precision == "auto" and device.type == "cpu" else args.precision
    folder = args.run or newest(with_checkpoint=True)
    kernel = load_choice("kernel", args.kernel)
    model, tokenizer = load_run(folder, device, args.checkpoint, kernel=kernel, execution=args.execution)
    model = MixedPrecision(model, choose_precision(precision, device)).model
    limit, slide = model.config.context_length, args.context == "slide"
    sampler = Sampler(**{name: getattr(args, name) for name in Sampler.model_fields})
    seeds = range(args.seed, args.seed + args.num_samples)
    if not args.stats:
        logging.getLogger("headroom").setLevel(logging.WARNING)  # which kernel runs is a matter of speed
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")

    def begin(tokens: list[int]) -> GenerationState:
        return GenerationState(model, [tokens] * len(seeds), seeds, cached=not args.no_cache, slide=slide)

    if args.text is not None:
        score = score_text(model, tokenizer, args.text, limit)
        print_stderr(f"run {folder}")
        if args.json:
            print(json_line({"file": str(args.score), **as_json(score)}), flush=True)
        refuse_not_finite(score, model, tokenizer, args.text, limit)
        if not args.json:
            print(as_line(score))
        return
    if args.attention_map is not None:
        draw_attention(model, tokenizer, args.prompt, args.attention_map, folder.resolve().name)
        print_stderr(f"run {folder}: {args.attention_map}")
        return
    if args.interactive:
        print_stderr(f"run {folder}")
        turns = {"max_new_tokens": args.max_new_tokens, "stops": args.stop}
        converse(Conversation(model, tokenizer, sampler, begin=begin, **turns), args.prompt)
        return

    prompt = prompt_tokens(tokenizer, args.prompt, limit, slide)
    print_stderr(f"run {folder}")
    texts = begin(prompt)
    read = int(texts.lengths[0])
    if read < len(prompt):
        print_stderr(f"[the context of {limit} tokens keeps the last {read} of the prompt's {len(prompt)}]")
    samples = [Sample(seed, read, tokenizer, args.stop) for seed in seeds]
    pieces = write(model, tokenizer, sampler, texts, samples, args.max_new_tokens)
    with deferred_logging():
        if args.json:
            list(pieces)
            for one in samples:
                print(json_line({"prompt": args.prompt, **one.described()}), flush=True)
        else:
            show_samples(args.prompt, pieces, samples, limit)
    if args.stats:
        for name, value in speeds(samples).items():
            print_stderr(f"{name}={'n/a' if value is None else value}")
        print_stderr(f"cache_bytes_per_token={sum(layer.bytes_per_token for layer in texts.caches or [])}")
    if any(one.finish == "interrupted" for one in samples):
        raise KeyboardInterrupt
    broken = [one for one in samples if one.finish == "not_finite"]
    if broken:
        where = ", ".join(f"{one.prompt_tokens + one.tokens} tokens (seed {one.seed})" for one in broken)
        raise NotFinite(f"the model's output is not finite after {where}")


def main() -> None:
    with one_line_errors():
        try:
            sample(arguments(__doc__))
        except NotFinite as error:
            raise UserError(f"{error}: try --checkpoint best, or --precision fp32") from None


if __name__ == "__main__":
    main()
