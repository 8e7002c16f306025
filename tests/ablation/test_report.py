"""compare.py: every number of a report is that of the metrics files, and what cannot be compared is refused."""

import json
import math
import shutil
import statistics
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path

import pytest
from scipy import stats

from ablation.match import measure
from ablation.report import labels_of, report_on
from ablation.sweep.run import run_sweep
from ablation.sweep.stored import SWEEPS
from common.errors import UserError
from tests.ablation import support
from tests.ablation.quick_sweeps import without_pictures, without_timing
from tests.support import TINY, call, changed, composed_run
from training.metrics_file import read_metrics
from training.run.config import compose
from training.run.load import load_run

SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a sweep of three attentions over three seeds, matched in parameters."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        typed = [
            *TINY,
            "attention=mha,gqa,mla",
            "seed=1,2,3",
            "match=params",
            "sweep=three",
            "hypothesis='MLA loses, 7 %'",
        ]
        support.train_sweep(typed, patch)
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def compared(arguments, monkeypatch, capsys):
    code = call("compare", arguments, monkeypatch)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def final(variant, seed):
    return read_metrics(SWEEPS / f"three/{variant},seed={seed}/metrics.jsonl")


def test_report_has_the_accuracy_of_runs_whose_data_has_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = changed(TINY, "data.size=80")
    options = [word for word in options if not word.startswith("data.")]
    options += ["data=mqar", "data.size=80", "tokenizer=numbers", "attention.window=null,8", "seed=1,2", "sweep=recall"]
    support.train_sweep(options, monkeypatch)
    code, out, _ = compared(["--no-decode"], monkeypatch, capsys)
    report = json.loads((SWEEPS / "recall/report.json").read_text())
    assert code == 0 and "accuracy" in out
    names = [variant["name"] for variant in report["variants"]]
    table = {}
    for variant in report["variants"]:
        rows = {s: read_metrics(SWEEPS / f"recall/{variant['name']},seed={s}/metrics.jsonl")[-1] for s in (1, 2)}
        table[variant["name"]] = [row["val_accuracy"] for row in rows.values()]
        assert list(variant["val_accuracy"]["values"].values()) == table[variant["name"]]
        assert variant["val_accuracy"]["mean"] == pytest.approx(statistics.fmean(table[variant["name"]]))
    found = {(cell["variant"], cell["seed"]): cell["val_accuracy"] for cell in report["cells"]}
    assert found == {(name, seed): table[name][seed - 1] for name in names for seed in (1, 2)}
    difference = statistics.fmean(table[names[1]]) - statistics.fmean(table[names[0]])
    assert report["accuracy"]["differences"][names[1]]["mean"] == pytest.approx(difference)
    caches = [variant["cache_bytes_per_token"] for variant in report["variants"]]
    assert caches[1] < caches[0]


def test_report_numbers_are_those_of_the_metrics_files(here, monkeypatch, capsys):
    code, out, _ = compared([], monkeypatch, capsys)
    assert code == 0 and "mla" in out
    report = json.loads((SWEEPS / "three/report.json").read_text())
    for variant in report["variants"]:
        rows = {seed: final(variant["name"], seed) for seed in SEEDS}
        seconds = [sum(256 / row["tokens_per_second"] for row in of_seed) for of_seed in rows.values()]
        expected = {
            "val_bpb": [of_seed[-1]["val_bpb"] for of_seed in rows.values()],
            "val_loss": [of_seed[-1]["val_loss"] for of_seed in rows.values()],
            "minutes": [each / 60 for each in seconds],
            "tokens_per_second": [rows[1][-1]["tokens"] / each for each in seconds],
            "memory_bytes": [max(row["memory_bytes"] for row in of_seed) for of_seed in rows.values()],
        }
        for key, values in expected.items():
            check_estimate(variant[key], values)
        last = rows[1][-1]
        assert variant["flops_per_token"] == pytest.approx(last["flops_per_second"] / last["tokens_per_second"])
        assert variant["tokens"] == last["tokens"] and variant["steps"] == 4
        assert variant["decode_tokens_per_second"] > 0
        for seed, curve in zip(SEEDS, variant["curves"], strict=True):
            check_curve(curve, rows[seed], variant["flops_per_token"])
    assert report["hypothesis"] == "MLA loses, 7 %" and report["match"] == ["params"]
    assert report["command"].startswith("python train.py -m experiment=smoke ")
    assert report["config_differences"]["attention"]["attention=mla"] == "MLA"
    assert report["environment"]["packages"]["torch"] and len(report["cells"]) == 9
    assert all(cell["val_bpb"] == final(cell["variant"], cell["seed"])[-1]["val_bpb"] for cell in report["cells"])


def check_estimate(found, values):
    mean, sd = statistics.fmean(values), statistics.stdev(values)
    assert list(found["values"].values()) == pytest.approx(values, rel=1e-12)
    assert (found["mean"], found["sd"]) == pytest.approx((mean, sd), rel=1e-9)
    half = stats.t.ppf(0.975, 2) * sd / math.sqrt(3)  # 0 where all are alike
    assert found["interval"] == pytest.approx((mean - half, mean + half), rel=1e-9)


def check_curve(curve, rows, flops_per_token):
    scored = [row for row in rows if "val_loss" in row]
    totals = accumulate(256 / row["tokens_per_second"] for row in rows)
    seconds = dict(zip((row["step"] for row in rows), totals, strict=True))
    assert curve["train_loss"] == [row["train_loss"] for row in rows]
    assert curve["train_bpb"] == [row["train_bpb"] for row in rows]
    assert curve["tokens"] == [row["tokens"] for row in rows] and curve["step"] == [1, 2, 3, 4]
    assert curve["seconds"] == pytest.approx([seconds[row["step"]] for row in rows])
    assert curve["flops"] == pytest.approx([row["tokens"] * flops_per_token for row in rows])
    assert curve["val_loss"] == [row["val_loss"] for row in scored]
    assert curve["val_bpb"] == [row["val_bpb"] for row in scored]
    assert curve["val_tokens"] == [row["tokens"] for row in scored]
    assert curve["val_seconds"] == pytest.approx([seconds[row["step"]] for row in scored])


def test_report_comparison_is_the_block_model_of_the_metrics_files(here):
    """By sums of squares, as a textbook has them."""
    report = report_on([SWEEPS / "three"], decode=False)
    names = [variant.name for variant in report.variants]
    table = [[final(name, seed)[-1]["val_bpb"] for seed in SEEDS] for name in names]
    mean = statistics.fmean(map(statistics.fmean, table))
    rows = [statistics.fmean(row) for row in table]
    columns = [statistics.fmean(column) for column in zip(*table, strict=True)]
    squares = sum((table[i][j] - rows[i] - columns[j] + mean) ** 2 for i in range(3) for j in range(3))
    pooled = math.sqrt(squares / 4)
    assert report.comparison.pooled_df == 4 and report.comparison.pooled_sd == pytest.approx(pooled, rel=1e-9)
    p_values = []
    for name, row in zip(names[1:], table[1:], strict=True):
        found = report.comparison.differences[name]
        differences = [value - base for value, base in zip(row, table[0], strict=True)]
        assert found.mean == pytest.approx(statistics.fmean(differences), rel=1e-9)
        assert found.own_sd == pytest.approx(statistics.stdev(differences), rel=1e-9)
        sd, df = (pooled * math.sqrt(2), 4) if found.method == "paired, pooled sd" else (found.own_sd, 2)
        error = sd / math.sqrt(3)
        assert found.p == pytest.approx(2 * stats.t.sf(abs(found.mean / error), df), rel=1e-9)
        half = stats.t.ppf(0.975, df) * error
        assert found.interval == pytest.approx((found.mean - half, found.mean + half), rel=1e-9)
        p_values.append(found.p)
    smaller, larger = sorted(p_values)
    corrected = sorted(found.p_corrected for found in report.comparison.differences.values())
    assert corrected == pytest.approx([min(1, 2 * smaller), max(min(1, 2 * smaller), larger)], rel=1e-9)
    sizes = [variant.parameters_without_embedding for variant in report.variants]
    assert max(sizes) / min(sizes) < 1.005
    for variant in report.variants:
        model = load_run(SWEEPS / f"three/{variant.name},seed=1")[0]
        assert variant.parameters == sum(p.numel() for p in model.parameters())
        caches = model.make_caches(1, 64)
        assert variant.cache_bytes_full == sum(c.rows * c.bytes_per_token for c in caches)
        assert variant.cache_bytes_per_token == variant.cache_bytes_full / 64


def test_report_html_needs_no_network_and_states_the_numbers(here, monkeypatch, capsys):
    assert compared(["sweeps/three", "-o", "out", "--no-decode"], monkeypatch, capsys)[0] == 0
    page = (here / "out/report.html").read_text()
    HTMLParser().feed(page)
    assert "http" not in page.replace("http://www.w3.org/", "") and "attention=mla" in page
    report = json.loads((here / "out/report.json").read_text())
    assert repr(report["variants"][1]["val_bpb"]["mean"]) in page
    assert {path.name for path in (here / "out").iterdir()} >= {"report.md", "report.json", "curves.png", "final.png"}


def test_report_of_a_cell_that_is_missing_or_damaged_names_it(here, monkeypatch, capsys):
    gone = SWEEPS / "three/attention=mla,seed=3"
    metrics = SWEEPS / "three/attention=mla,seed=2/metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    gone.rename("aside")
    metrics.write_text("".join([lines[0], "{nonsense\n", *lines[2:]]))
    try:
        code, out, _ = compared(["sweeps/three", "--no-decode", "-o", "out"], monkeypatch, capsys)
    finally:
        Path("aside").rename(gone)
        metrics.write_text("".join(lines))
    text = " ".join(out.split())
    assert code == 0 and "attention=mla lacks seed 3" in text and "attention=mla,seed=3" in text
    assert "not begun" in text and "1 damaged row of" in text
    report = json.loads(Path("out/report.json").read_text())
    assert report["comparison"]["differences"]["attention=mla"]["seeds"] == [1, 2]


def test_report_of_cells_that_were_altered_or_are_damaged_leaves_them_out(here, monkeypatch, capsys):
    """One trained on by hand, and one that lost its vocabulary."""
    shutil.copytree("sweeps/three", "sweeps/altered")
    with monkeypatch.context() as patch:
        without_pictures(patch)
        for checkpoint in Path("sweeps/altered/attention=mha,seed=1/checkpoints").glob("*4"):
            shutil.rmtree(checkpoint)  # the cooldown has begun by then
        assert call("train", ["resume='sweeps/altered/attention=mha,seed=1'", "steps=6"], patch, drawn=True) == 0
    Path("sweeps/altered/attention=mla,seed=2/tokenizer.json").write_text("{}")
    capsys.readouterr()
    report = report_on([SWEEPS / "altered"], decode=False)
    states = {cell.name: (cell.state, cell.detail) for cell in report.cells if cell.state != "finished"}
    state, detail = states.pop("attention=mha,seed=1")
    assert state == "altered" and "the sweep has" in detail
    assert states.pop("attention=mla,seed=2")[0] == "damaged" and not states
    assert report.comparison.differences["attention=mla"].seeds == [3]
    assert "attention=mha lacks seed 1" in report.notes


def test_report_cache_of_a_window_is_that_of_a_full_context(workplace, monkeypatch):
    call("train", [*TINY, "attention=gqa", "attention.window=16", "run_dir=a"], monkeypatch)
    (variant,) = report_on([Path("a")], decode=False).variants
    assert variant.cache_bytes_per_token == measure(
        "cache", composed_run(*TINY, "attention=gqa", "attention.window=16").model, 257
    )
    assert variant.cache_bytes_per_token * 64 == variant.cache_bytes_full


def test_compare_two_ordinary_runs_have_no_p(here, monkeypatch, capsys):
    runs = [f"sweeps/three/attention={name},seed=1" for name in ("mha", "mla")]
    code, out, _ = compared([*runs, "--no-decode"], monkeypatch, capsys)
    assert code == 0 and "no p" in out
    report = json.loads(Path("report/report.json").read_text())
    assert report["comparison"]["differences"][runs[1]]["p"] is None and report["command"] is None
    assert report["config_differences"]["mlp.d_ff"] and Path("report/curves.png").is_file()


def test_compare_of_optimizers_says_that_each_chose_the_first_logits(workplace, monkeypatch):
    for name in ("muon", "adamw"):
        call("train", [*TINY, f"optim={name}", f"run_dir={name}"], monkeypatch)
    note = "model.own_logit_init is 1.0 of muon, null of adamw: set it, and optimizers alone are compared"
    assert any(note in one for one in report_on([Path("muon"), Path("adamw")], decode=False).notes)
    call("train", [*TINY, "optim=adamw", "model.own_logit_init=1", "run_dir=alike"], monkeypatch)
    assert not any("begin unlike" in one for one in report_on([Path("muon"), Path("alike")], decode=False).notes)


def test_compare_runs_that_differ_in_the_seed_alone_are_one_variant(here):
    folders = [SWEEPS / f"three/attention={name},seed={seed}" for name in ("mha", "mla") for seed in (1, 2)]
    report = report_on(folders, decode=False)
    assert [variant.name for variant in report.variants] == ["attention=mha", "attention=mla"]
    assert report.comparison.differences["attention=mla"].p is not None
    again = report_on([folders[2], folders[0]], decode=False, baseline=str(folders[0]))
    assert again.comparison.baseline == str(folders[0])


def test_compare_sweeps_that_begin_with_the_runs_of_another_seed_by_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mla = ["attention=mla", "attention.q_lora_rank=8", "seed=1,2", "sweep=base"]
    support.train_sweep([*TINY, *mla], monkeypatch)
    begun = [*TINY, "init_from=sweeps/base/seed=${seed}", "seed=1,2"]
    support.train_sweep([*begun, "attention.window=null,8", "sweep=windows"], monkeypatch)
    support.train_sweep([*begun, "attention=dsa", "attention.indexer.top_k=choice(8)", "sweep=chosen"], monkeypatch)
    for path in SWEEPS.glob("*/*seed=*/config.yaml"):
        base = f"sweeps/base/{path.parent.name.rpartition(',')[2]}"
        assert (f"init_from: {base}\n" in path.read_text()) == (path.parts[1] != "base")
    capsys.readouterr()
    code, _, _ = compared(["sweeps/windows", "sweeps/chosen", "--no-decode"], monkeypatch, capsys)
    report = json.loads(Path("report/report.json").read_text())
    names = ["attention.window=null", "attention.window=8", "attention.indexer.top_k=8"]
    assert code == 0 and [variant["name"] for variant in report["variants"]] == names
    assert len({variant["label"] for variant in report["variants"]}) == 3
    assert report["config_differences"]["attention.window"] == dict(zip(names, (None, 8, None), strict=True))
    assert [len(report["comparison"]["differences"][name]["seeds"]) for name in names[1:]] == [2, 2]
    assert {cell["state"] for cell in report["cells"]} == {"finished"} and len(report["cells"]) == 6
    assert report["command"].count("train.py -m") == 2
    shutil.copytree("sweeps/base", "sweeps/again")
    code, _, err = compared(["sweeps/base", "sweeps/again"], monkeypatch, capsys)
    assert code == 2 and "sweeps/base and sweeps/again both have this model, which would be one variant" in err


def test_compare_unfinished_run_is_drawn_and_not_compared(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("training.session.Session.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        call("train", [*TINY, "run_dir=stopped"], patch)
    call("train", [*TINY, "run_dir=whole"], monkeypatch)
    call("train", [*changed(TINY, "eval_every=0"), "run_dir=unscored"], monkeypatch)
    rows = Path("unscored/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("unscored/metrics.jsonl").write_text("".join(rows[:-1]))
    capsys.readouterr()
    code, out, _ = compared(["whole", "stopped", "unscored", "--no-decode"], monkeypatch, capsys)
    text = " ".join(out.split())
    assert code == 0 and "stopped has not finished (stopped at step 2 of 4)" in text
    assert "unscored is passed over: it has no validation loss yet" in text
    assert json.loads(Path("report/report.json").read_text())["comparison"] is None


def test_compare_other_texts_are_refused_unless_forced(here, monkeypatch, capsys):
    call("train", [*TINY, "run_dir=a"], monkeypatch)
    call("train", [*TINY[:2], "data.size=200", *TINY[3:], "run_dir=b"], monkeypatch)
    call("train", [*TINY, "tokenizer=bpe", "tokenizer.vocab_size=300", "run_dir=c"], monkeypatch)
    capsys.readouterr()
    code, _, err = compared(["a", "b"], monkeypatch, capsys)
    assert code == 2 and "a and b have not the same corpus, so their losses are of different things" in err
    code, _, err = compared(["a", "c"], monkeypatch, capsys)
    assert code == 2 and "a and c have not the same tokenizer" in err
    code, out, _ = compared(["a", "c", "--force", "--no-decode"], monkeypatch, capsys)
    assert code == 0 and "only bits per byte are comparable" in " ".join(out.split())


REFUSED = {
    "no folder": (["nothing"], "nothing is not a run"),
    "a folder of something": (["cache"], "cache is not a run: it has no config.yaml"),
    "a sweep beside runs": (
        ["sweeps/three", "sweeps/three/attention=mha,seed=1"],
        "sweeps/three is a sweep, and sweeps/three/attention=mha,seed=1 is none: compare sweeps, or give runs",
    ),
    "no such baseline": (["--baseline", "mqa"], "--baseline mqa is no variant here: choose one of attention=mha"),
    "no folder to write": (["-o", "sweeps/three/sweep.json/x"], "-o"),
    "no such axis": (["--x", "miles"], "invalid choice: 'miles'"),
}


@pytest.mark.parametrize(("arguments", "complaint"), REFUSED.values(), ids=REFUSED)
def test_compare_refuses_in_one_line(here, monkeypatch, capsys, arguments, complaint):
    code, _, err = compared(arguments, monkeypatch, capsys)
    assert code == 2 and complaint in err.splitlines()[-1] and err.count("error: ") == 1


def test_compare_without_a_sweep_says_how_to_make_one(workplace, monkeypatch, capsys):
    code, _, err = compared([], monkeypatch, capsys)
    assert code == 2 and "there is no sweep in" in err and "train.py -m attention=mha,mla seed=1,2,3 makes one" in err


def test_compare_sweep_without_a_finished_run_is_refused(workplace, monkeypatch, capsys):
    without_timing(monkeypatch)
    assert run_sweep([*TINY, "seed=1,2", "sweep=none"], lambda words: 2) == 2
    code, _, err = compared(["sweeps/none"], monkeypatch, capsys)
    assert code == 2 and "no run of it has finished (seed=1: exit code 2; seed=2: exit code 2)" in err


@pytest.mark.parametrize(("slowed", "noted"), [(1.3, False), (3.0, True)])
def test_report_says_which_runs_were_trained_on_a_busy_machine(workplace, monkeypatch, slowed, noted):
    """Whose steps took unlike times: here, every fifth."""
    options = changed(TINY, "steps=20", "eval_every=20", "save_every=20")
    for name, factor in (("even", 1.05), ("uneven", slowed)):
        assert call("train", [*options, f"run_dir={name}"], monkeypatch) == 0
        rows = read_metrics(Path(name, "metrics.jsonl"))
        for row in rows:
            row["tokens_per_second"] = (1000 + row["step"]) / (1 if row["step"] % 5 else factor)
        Path(name, "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    said = [note for note in report_on([Path("even"), Path("uneven")], decode=False).notes if "busy" in note]
    assert len(said) == noted
    if noted:
        assert "while it trained uneven: a tenth of the steps took 3.0 times the median or longer" in said[0]


def test_labels_of_one_varying_setting_are_its_values():
    assert labels_of(["attention=mha", "attention=mla"]) == {"attention=mha": "mha", "attention=mla": "mla"}
    both = ["attention=mha,steps=3", "attention=mla,steps=3"]
    assert labels_of(both) == {name: name for name in both}
    assert labels_of(["this model"]) == {"this model": "this model"}


def test_compose_ignores_settings_of_the_command():
    assert compose(*TINY, "match=params", "minutes=3", "hypothesis=x") == composed_run(*TINY)
    with pytest.raises(UserError, match="resume= goes on"):
        compose("resume=latest")
