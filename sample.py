"""Continues a prompt with a trained model, decoding through the cache of its attention.

python sample.py "def solve("                     # the newest run; streams the text
python sample.py --run runs/NAME --max-new-tokens 300 --temperature 0.8 --top-k 50 --seed 7 --stats
"""

import argparse
import codecs
import sys
import time
from pathlib import Path

from training.command import CONF, Parser, number, one_line_errors

# torch, and all that needs it, is imported inside `sample`: --help answers before it would have loaded.


def arguments() -> argparse.Namespace:
    kernels = sorted(path.stem for path in (CONF / "kernel").glob("*.yaml"))
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?", default="", help="text to continue, verbatim; without one, a new document begins")
    add("--run", type=Path, metavar="DIR", help="the run's folder (default: the newest with a checkpoint)")
    add("--checkpoint", choices=["latest", "best"], default="latest", help="best: of the lowest validation loss")
    add("--max-new-tokens", type=number(int, 1), default=200, metavar="N", help="default: 200")
    add("--temperature", type=number(float, 0), default=0.8, metavar="T", help="0 is greedy; default: 0.8")
    add("--top-k", type=number(int, 1), metavar="K", help="sample among the K likeliest tokens")
    add("--top-p", type=number(float, 0, 1), metavar="P", help="sample among the fewest tokens that reach P")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="S", help="same seed, same text; default: 0")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto: fp32 on a CPU")
    add("--kernel", choices=kernels, default="auto", help="how attention is computed; default: auto")
    add("--execution", choices=["naive", "expanded", "absorbed"], help="how MLA runs; default: what costs least")
    add("--no-cache", action="store_true", help="compute the whole text anew for every token")
    add("--stats", action="store_true", help="print speeds and the cache's size to stderr")
    return parser.parse_args()


def sample(args: argparse.Namespace) -> None:
    from model.generate import Sampler, generate
    from training.config import load_choice
    from training.device import choose_device
    from training.log import to_stderr
    from training.precision import Working, choose_precision
    from training.preview import prompt_tokens
    from training.run_folder import newest
    from training.trained import load_run

    to_stderr()
    device = choose_device(args.device)
    precision = "fp32" if args.precision == "auto" and device.type == "cpu" else args.precision
    folder = args.run or newest(with_checkpoint=True)
    kernel = load_choice("kernel", args.kernel)
    model, tokenizer = load_run(folder, device, args.checkpoint, kernel=kernel, execution=args.execution)
    model = Working(model, choose_precision(precision, device)).model
    limit = model.config.context_length
    prompt = prompt_tokens(tokenizer, args.prompt, limit)
    print(f"run {folder}", file=sys.stderr)

    steps = generate(
        model,
        [prompt],
        Sampler(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p),
        max_new_tokens=args.max_new_tokens,
        seeds=[args.seed],
        end_token=tokenizer.end_of_text,
        cached=not args.no_cache,
    )
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back half a character until it is whole
    sys.stdout.reconfigure(encoding="utf-8")
    print(args.prompt, end="", flush=True)
    times = [time.perf_counter()]
    for step in steps:
        times.append(time.perf_counter())
        token = int(step[0])
        print(text.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    print(text.decode(b"", final=True))

    new = len(times) - 1
    if token == tokenizer.end_of_text:
        print("[end of document]", file=sys.stderr)
    elif len(prompt) + new == limit:
        print(f"[the context of {limit} tokens is full]", file=sys.stderr)
    if args.stats:
        cache = 0 if args.no_cache else sum(layer.bytes_per_token for layer in model.make_caches(1, 1))
        decode = f"{(new - 1) / (times[-1] - times[1]):.1f}" if new > 1 else "n/a"
        print(f"prefill_tokens_per_second={len(prompt) / (times[1] - times[0]):.1f}", file=sys.stderr)
        print(f"decode_tokens_per_second={decode}", file=sys.stderr)
        print(f"cache_bytes_per_token={cache}", file=sys.stderr)


def main() -> None:
    with one_line_errors():
        try:
            sample(arguments())
        except KeyboardInterrupt:
            print(file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
