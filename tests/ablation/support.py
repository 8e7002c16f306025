"""Reports that no run has made, of every kind that a comparison can end in; and a sweep that is trained in-process."""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from ablation.pages.words import summary
from ablation.results import Cell, Curve, Report, Variant
from ablation.statistics import Comparison, Difference, Estimate
from ablation.sweep.run import run_sweep
from tests.ablation.quick_sweeps import composing_once, without_pictures, without_timing
from tests.support import call

BYTES = 2.9  # of a token, in the made-up text
CACHE = {"mha": 4096, "gqa": 1024, "mqa": 512, "mla": 640}


def train_sweep(typed: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Run `train.py -m` in the working directory, quickly."""
    for quick in (without_pictures, without_timing, composing_once):
        quick(patch)
    assert run_sweep([*typed], lambda words: call("train", words, patch, drawn=True)) == 0


def estimate(values: Mapping[int, float], half: float = 2.5) -> Estimate:
    mean = statistics.fmean(values.values())
    if len(values) < 2:
        return Estimate(dict(values), mean, None, None)
    sd = statistics.stdev(values.values())
    reach = half * sd / math.sqrt(len(values))
    return Estimate(dict(values), mean, sd, (mean - reach, mean + reach))


def curve(variant: str, seed: int, final: float, steps: int = 600) -> Curve:
    """A loss that falls from 9 nats to `final`, with the noise of its seed."""
    noise = random.Random(ascii((variant, seed)))
    places = list(range(1, steps + 1, 3))
    train = [final + (9 - final) * math.exp(-(s**0.55) / 3) + noise.gauss(0, 0.01) for s in places]
    scored = [s for s in range(50, steps + 1, 50)]
    val = [final + (9 - final) * math.exp(-(s**0.55) / 3) + noise.gauss(0, 0.004) for s in scored[:-1]] + [final]
    speed = 0.1 + 0.01 * noise.random()
    return Curve(
        seed=seed,
        run=f"sweeps/made-up/{variant},seed={seed}",
        step=places,
        tokens=[4096 * s for s in places],
        seconds=[speed * s for s in places],
        flops=[4096 * s * 7.2e6 for s in places],
        train_loss=train,
        train_bpb=[bpb(loss) for loss in train],
        val_step=scored,
        val_tokens=[4096 * s for s in scored],
        val_seconds=[speed * s for s in scored],
        val_flops=[4096 * s * 7.2e6 for s in scored],
        val_loss=val,
        val_bpb=[bpb(loss) for loss in val],
    )


def bpb(loss: float) -> float:
    return loss / math.log(2) / BYTES


def variant(name: str, losses: Mapping[int, float], cache: int = 4096, steps: int = 600, **changes) -> Variant:
    made = Variant(
        name=name,
        label=name.partition("=")[2] or name,
        val_bpb=estimate({seed: bpb(loss) for seed, loss in losses.items()}),
        val_loss=estimate(losses),
        parameters=1_212_416,
        parameters_without_embedding=950_272,
        flops_per_token=7_234_560.0,
        cache_bytes_per_token=cache,
        cache_bytes_full=cache * 256,
        context_length=256,
        steps=steps,
        tokens=4096 * steps,
        minutes=estimate({seed: 1.02 + 0.01 * seed for seed in losses}),
        tokens_per_second=estimate({seed: 40_123.0 + 97 * seed for seed in losses}),
        decode_tokens_per_second=512.25,
        memory_bytes=estimate({seed: 734_003_200.0 + 4096 * seed for seed in losses}),
        matched={},
        curves=[curve(name, seed, loss, steps) for seed, loss in losses.items()],
    )
    return replace(made, **changes)


def difference(mean: float, p_corrected: float | None, **changes) -> Difference:
    """A paired difference; one without a p has too few seeds."""
    if p_corrected is None:
        few = Difference(mean, [1], "too few", None, None, None, None, None, None, None)
        return replace(few, **changes)
    made = Difference(
        mean=mean,
        seeds=[1, 2, 3],
        method="paired, pooled sd",
        sd=0.0093,
        own_sd=0.0081,
        df=6.0,
        interval=(mean - 0.0131, mean + 0.0131),
        p=p_corrected / 2,
        p_corrected=p_corrected,
        detectable=0.0211,
    )
    return replace(made, **changes)


def report(variants: Sequence[Variant], differences: Mapping[str, Difference] | None, **changes) -> Report:
    comparison = None
    if differences is not None:
        pooled = any(found.p is not None for found in differences.values())
        comparison = Comparison(variants[0].name, 0.0066 if pooled else None, 6 if pooled else 0, dict(differences))
    cells = [
        Cell(
            name=f"{made.name},seed={seed}",
            variant=made.name,
            seed=seed,
            folder=f"sweeps/made-up/{made.name},seed={seed}",
            state="finished",
            detail="",
            val_loss=made.val_loss.values[seed],
            val_bpb=made.val_bpb.values[seed],
        )
        for made in variants
        for seed in made.val_loss.values
    ]
    made = Report(
        title="made-up",
        command="python train.py -m attention=mha,gqa,mqa,mla seed=1,2,3 match=params",
        hypothesis=None,
        match=["params"],
        metric="val_bpb",
        metric_name="bits per byte",
        comparison=comparison,
        variants=list(variants),
        cells=cells,
        summary=[],
        notes=[],
        config_differences={
            "attention": {made.name: made.label for made in variants},
            "mlp.d_ff": {made.name: 512 + 8 * i for i, made in enumerate(variants)},
        },
        environment={"python": "3.12.3", "torch": "2.13.0", "commit": "3095c60", "threads": [1, 2]},
        data={"corpus": "sympy", "fingerprint": "9f86d081", "tokenizer": "bpe, 2,048", "validation tokens": 131072},
    )
    made = replace(made, **changes)
    return replace(made, summary=summary(made))


def without(report_: Report, *cells: Cell) -> Report:
    """The report with cells that have no result."""
    made = replace(report_, cells=[*report_.cells, *cells])
    return replace(made, summary=summary(made))


def losses(mean: float, seeds: int = 3, spread: float = 0.02) -> dict[int, float]:
    noise = random.Random(mean)
    return {seed: mean + noise.gauss(0, spread) for seed in range(1, seeds + 1)}


def four() -> Report:
    """Four variants at three seeds: one better, one worse, one not distinguishable."""
    means = {"mha": 3.22, "gqa": 3.18, "mqa": 3.23, "mla": 3.31}
    variants = [variant(f"attention={name}", losses(mean), CACHE[name]) for name, mean in means.items()]
    base = variants[0].val_bpb.mean
    found = {made.name: made.val_bpb.mean - base for made in variants[1:]}
    p = {"attention=gqa": 0.0312, "attention=mqa": 0.63, "attention=mla": 0.00042}
    return report(variants, {name: difference(mean, p[name]) for name, mean in found.items()})


def one_seed() -> Report:
    variants = [variant("attention=mha", losses(3.2, 1)), variant("attention=mla", losses(3.3, 1), 640)]
    return report(variants, {"attention=mla": difference(bpb(0.1), None)}, match=[])


def many() -> Report:
    """Fourteen variants."""
    variants = [variant(f"attention.window={2**i}", losses(3.0 + 0.03 * i), 64 * 2**i) for i in range(14)]
    base = variants[0].val_bpb.mean
    p = [0.0001 if i > 9 else 0.5 + 0.01 * i for i in range(14)]
    found = {made.name: difference(made.val_bpb.mean - base, p[i]) for i, made in enumerate(variants) if i}
    return report(variants, found, title="attention.window", match=["params", "flops"])


def with_accuracy() -> Report:
    """Four variants whose data has right answers."""
    made = four()
    means = {"mha": 0.98, "gqa": 0.97, "mqa": 0.75, "mla": 0.9}
    variants = [
        replace(each, val_accuracy=estimate({seed: means[each.label] + 0.001 * seed for seed in (1, 2, 3)}))
        for each in made.variants
    ]
    cells = [
        replace(cell, val_accuracy=means[cell.variant.partition("=")[2]] + 0.001 * cell.seed) for cell in made.cells
    ]
    found = {f"attention={name}": difference(means[name] - means["mha"], p) for name, p in
             {"gqa": 0.4, "mqa": 0.0003, "mla": 0.01}.items()}  # fmt: skip
    compared = Comparison(variants[0].name, 0.0066, 6, found)
    made = replace(made, variants=variants, cells=cells, accuracy=compared)
    return replace(made, summary=summary(made))


ALTERED = "trained with steps=900, the sweep has 600"


def broken() -> Report:
    """A cell that failed, one that diverged, one that is missing, one that was trained on, and a note."""
    cells = [
        Cell("attention=mla,seed=4", "attention=mla", 4, "sweeps/x/4", "failed", "exit code 2", None, None),
        Cell("attention=mla,seed=5", "attention=mla", 5, "sweeps/x/5", "diverged", "diverged at step 120", None, None),
        Cell("attention=mha,seed=5", "attention=mha", 5, "sweeps/x/6", "missing", "", None, None),
        Cell("attention=mha,seed=6", "attention=mha", 6, "sweeps/x/7", "altered", ALTERED, None, None),
    ]
    return without(replace(four(), notes=["Seeds 4 and 5 are missing in some cells."]), *cells)


NAMES = ["$x_1$", "_a", "<b>", "a&b|`c`", "x" * 90, "漢字\x1b[31m\n", "b\udcff", "[red]*q*[/red]"]


def weird() -> Report:
    """Names that mean something to HTML, Markdown, rich, matplotlib or a terminal."""
    variants = [variant(name, losses(3.1 + 0.02 * i, 2), label=name) for i, name in enumerate(NAMES)]
    base = variants[0].val_bpb.mean
    found = {made.name: difference(made.val_bpb.mean - base, 0.2) for made in variants[1:]}
    return report(variants, found, title="<script>alert(1)</script> $x$", command="python train.py -m a='<b>'")


def welch() -> Report:
    """Seeds that are not common."""
    variants = [variant("attention=mha", {1: 3.2, 2: 3.22}), variant("attention=mla", {3: 3.3, 4: 3.33}, 640)]
    found = difference(bpb(0.105), 0.041, seeds=[], method="Welch", df=1.7, own_sd=None)
    return report(variants, {"attention=mla": found})


def identical() -> Report:
    variants = [variant("compile=false", losses(3.2)), variant("compile=true", losses(3.2))]
    same = Difference(0.0, [1, 2, 3], "identical", 0.0, 0.0, None, None, None, None, None)
    return report(variants, {"compile=true": same}, match=[])


def two_runs() -> Report:
    """Two ordinary runs of different lengths, of which nothing is known but their rows."""
    variants = [variant("brave-otter", {1: 3.2}, steps=300), variant("calm-fox", {1: 3.26}, 640, steps=600)]
    variants = [replace(made, decode_tokens_per_second=None, memory_bytes=None) for made in variants]
    cells = [replace(cell, name=cell.variant) for cell in report(variants, None).cells]
    return report(
        variants, None, title="brave-otter and calm-fox", command=None, match=[], cells=cells, config_differences={}
    )


def unlike() -> Report:
    """Runs of unlike tokenizers, of which only bits per byte are compared."""
    made = four()
    nothing = Estimate({}, math.nan, None, None)
    made = replace(made, variants=[replace(each, val_loss=nothing) for each in made.variants])
    return replace(made, summary=summary(made))


ALL = {
    "four": four,
    "one_seed": one_seed,
    "many": many,
    "broken": broken,
    "weird": weird,
    "welch": welch,
    "identical": identical,
    "two_runs": two_runs,
    "unlike": unlike,
    "with_accuracy": with_accuracy,
}
