"""False alarms among real runs: 40 of one setting, compared as if they were of several."""

import numpy as np
import pytest

from ablation.statistics import LEVEL, compare
from tests.support import SMOKE, call
from training.metrics_file import read_metrics

RUNS = 40
RELABELINGS = 10_000
TINY = [*SMOKE, "steps=20", "batch_tokens=512", "eval_every=0", "eval_before=false", "save_every=20"]


@pytest.fixture(scope="module")
def val_bpb(tmp_path_factory):
    """Final bits per byte of each run, which differ in the seed alone."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.chdir(folder)
        for seed in range(RUNS):
            assert call("train", [*TINY, f"seed={seed}", f"run_dir=runs/{seed}"], patch) == 0
            found.append(read_metrics(folder / f"runs/{seed}/metrics.jsonl")[-1]["val_bpb"])
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize(("variants", "seeds"), [(2, 5), (4, 3), (4, 5)])
def test_compare_relabeled_runs_of_one_setting_raise_five_alarms_in_a_hundred(val_bpb, variants, seeds):
    assert len(set(val_bpb)) == RUNS
    rng = np.random.default_rng(0)
    alone = []
    family = []
    for _ in range(RELABELINGS):
        chosen = rng.choice(val_bpb, (variants, seeds), replace=False)
        table = {str(i): dict(enumerate(map(float, values))) for i, values in enumerate(chosen)}
        differences = compare(table, "0").differences.values()
        alone.append(np.mean([difference.p < LEVEL for difference in differences]))
        family.append(any(difference.p_corrected < LEVEL for difference in differences))
    print(f"{variants} x {seeds}: {np.mean(alone):.2%} of comparisons, {np.mean(family):.2%} of tables")
    assert 0.035 < np.mean(alone) < 0.06  # below 5 % where a wide variant is judged by its own, larger sd
    assert np.mean(family) < 0.06
