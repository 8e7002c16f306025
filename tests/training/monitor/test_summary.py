"""The summary lines of a run, from numbers alone."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from model.score import Score
from tests.support import composed_run
from training.measure import Measured
from training.monitor import summary
from training.monitor.progress import progress_text

ROW = {"step": 300, "train_loss": 3.0, "train_bpb": 1.25, "tokens_per_second": 12345.0, "mfu": 0.5}


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (None, "step 300/9000  loss 3.000  bpb 1.250  12,345 tokens/s  MFU 50.0%  ETA 1:02:05"),
        (77, "step 300/9000  loss 3.000  bpb 1.250  12,345 tokens/s  MFU 50.0%  ETA 1:02:05"),
        (76, "step 300/9000  loss 3.000  bpb 1.250  12,345 tokens/s  ETA 1:02:05"),
        (55, "step 300/9000  loss 3.000  12,345 tokens/s  ETA 1:02:05"),
        (54, "step 300/9000  loss 3.000  ETA 1:02:05"),
        (10, "step 300/9000  loss 3.000  ETA 1:02:05"),
    ],
)
def test_progress_text_on_a_narrow_terminal_keeps_step_loss_and_eta(width, text):
    assert progress_text(ROW, 9000, 3725, width) == text


def test_progress_text_without_a_known_peak_shows_no_mfu():
    assert progress_text({**ROW, "mfu": None}, 9000, 1) == (
        "step 300/9000  loss 3.000  bpb 1.250  12,345 tokens/s  ETA 0:01"
    )


def test_speed_line_without_a_known_peak_shows_no_mfu():
    assert summary.speed_line(12345.0, None, 0.01) == (
        "speed        12,345 training tokens per second, 1.0% of the time waiting for data"
    )
    assert "per second, MFU 25.0%, 1.0% of" in summary.speed_line(12345.0, 0.25, 0.01)


def test_before_line_compares_the_same_tokens():
    prefix = Score(nats=4.0, tokens=2, text_bytes=2)
    assert list(summary.before_line(None, prefix)) == []
    assert list(summary.before_line({"val_loss": None, "val_bpb": None}, prefix)) == []
    (better,) = summary.before_line({"val_loss": 3.0, "val_bpb": 4.0}, prefix)
    assert better == (
        "before       3.0000 nats per token, 4.0000 bits per byte; now 2.0000 and 2.8854, which is better (both on the "
        "first 2 tokens of the validation set)"
    )
    (worse,) = summary.before_line({"val_loss": 2.0, "val_bpb": 4.0}, prefix)
    assert "which is no better (both on" in worse


def stopped(step: int, within: bool = False, unscored: bool = False, complete: bool = False) -> str:
    return summary.stopped_line("SIGINT", step, within=within, unscored=unscored, complete=complete, go_on="go on")


def test_stopped_line_says_what_is_saved():
    assert stopped(0) == "SIGINT: stopped before step 1; nothing is to be saved yet; go on"
    assert stopped(0, within=True) == (
        "SIGINT: stopped within step 1, which does not count; nothing is to be saved yet; go on"
    )
    assert stopped(7, within=True) == "SIGINT: stopped within step 8, which does not count; step 7 is saved; go on"
    assert stopped(7) == "SIGINT: stopped after step 7; saved; go on"
    unscored = "SIGINT: stopped after step 7; saved, its evaluation is still to come; go on"
    assert stopped(7, unscored=True) == stopped(7, unscored=True, complete=True) == unscored
    assert "; it was the last one, its final lines are still to come; go on" in stopped(7, complete=True)


def run_with(start: int | None) -> SimpleNamespace:
    return SimpleNamespace(steps=100, schedule=SimpleNamespace(decay_start_step=lambda steps: start))


def test_longer_run_after_a_cooldown_needs_a_checkpoint_from_before(tmp_path):
    for start in (None, 100):
        assert summary.longer_run(run_with(start), tmp_path, None).endswith(f"resume={tmp_path} steps=200")
    assert summary.longer_run(run_with(80), tmp_path, None) == (
        "(a longer run is a new one: the cooldown began at step 80, and no checkpoint from before is left)"
    )
    longer = summary.longer_run(run_with(80), tmp_path, "step_00000060")
    assert "steps=200  (after moving away the checkpoints after step_00000060: the cooldown began at step 80)" in longer


def test_opening_lines_spell_settings_as_they_are_typed():
    measured = Measured(1, 2, 3.0, threads=2, attention_differences={"qk_norm": False, "window": None, "dilation": 2})
    corpus = SimpleNamespace(
        contents="", train=range(90000), val=range(9000), tokenizer=SimpleNamespace(vocab_size=9), fingerprint="f" * 20
    )
    model, attention, *_ = summary.opening_lines(composed_run(), Path("run"), corpus, "cpu", 0, measured)
    assert model.endswith("on cpu, 2 threads")
    assert attention.endswith("with a key and a value each: qk_norm=false window=null dilation=2")
