"""A test of the tests: each case plants one fault in a copy of the sources, and the fast tests must fail on it.

A fault that comes through is a promise that no fast test keeps. Where a line below has been rewritten, write the same
fault into the line that took its place.

Measured with 36 faults: six and a half minutes of processor time in one process, of which a fault takes 7 s; 25 minutes
where that process had a quarter of a busy core.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import ROOT

FAST = "not slow and not long"  # the tests of `make test`
PASSED, FAILED = 0, 1  # exit codes of pytest; the others say that it could not run the tests
MAX_SECONDS = 900
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
IMPORTS = """
import importlib
from pathlib import Path

def test_modules_are_of_this_folder():
    for name in {modules}:
        assert Path(importlib.import_module(name).__file__).is_relative_to(Path(__file__).parent.parent), name
"""


class Fault(NamedTuple):
    name: str
    file: str
    line: str  # as it is, without its indentation
    becomes: str
    guard: str  # the file of the fast tests that must catch it
    words: str = ""  # which of its tests are enough, as -k takes them


FAULTS = [
    Fault(
        "attention scale without the root of the key width",
        "model/attention/base.py",
        "scale = key_dim**-0.5 * self.softmax_scale_factor",
        "scale = self.softmax_scale_factor",
        "tests/model/attention/test_parity.py",
        "llama and weights",
    ),
    Fault(
        "causal mask shows a token its successor",
        "model/mask.py",
        "seen = distance >= 0 if self.causal else distance == distance",
        "seen = distance >= -1 if self.causal else distance == distance",
        "tests/model/test_kernels.py",
        "pattern",
    ),
    Fault(
        "window shows a token too many",
        "model/mask.py",
        "local = distance.abs() < self.window",
        "local = distance.abs() <= self.window",
        "tests/model/test_kernels.py",
        "pattern",
    ),
    Fault(
        "tiles leave out a key that the window shows",
        "model/mask.py",
        "start = 0 if self.window is None else max(0, rows.start - self.window + 1)",
        "start = 0 if self.window is None else max(0, rows.start - self.window + 2)",
        "tests/model/test_kernels.py",
        "any_tile_size",
    ),
    Fault(
        "packed documents see those before them",
        "model/mask.py",
        "seen = seen & (k_doc == q_doc)",
        "seen = seen & (k_doc <= q_doc)",
        "tests/model/attention/test_laws.py",
        "packed",
    ),
    Fault(
        "online softmax is rescaled by the inverse",
        "model/kernels/online.py",
        "return (m - m_new).exp()",
        "return (m_new - m).exp()",
        "tests/model/test_kernels.py",
        "online and naive",
    ),
    Fault(
        "absorbed keys are not normed",
        "model/attention/mla.py",
        "key = row * inverse",
        "key = row",
        "tests/model/attention/test_laws.py",
        "mla and executions",
    ),
    Fault(
        "cached keys are not rotated",
        "model/attention/gqa.py",
        "k = ctx.rotated(self.k_norm(k), self.rope)  # (B, T, G, D)",
        "k = ctx.rotated(self.k_norm(k), self.rope if cache is None else None)",
        "tests/model/attention/test_laws.py",
        "cache and uncached",
    ),
    Fault(
        "top-k of a large vocabulary draws other tokens than it found",
        "generation/sampler.py",
        "return logits.gather(-1, tokens), tokens",
        "return logits.gather(-1, tokens), tokens + 1",
        "tests/generation/test_sampler.py",
        "large_vocabulary",
    ),
    Fault(
        "the compiled step stands a token behind",
        "generation/compiled_step.py",
        "return model(tokens, extent.shape[0] - 1)",
        "return model(tokens, extent.shape[0] - 2)",
        "tests/generation/test_compiled_step.py",
        "traces_once",
    ),
    Fault(
        "cache bytes count the keys alone",
        "model/attention/gqa.py",
        "return 2 * self.n_kv_heads * self.head_dim + self.index_elements",
        "return self.n_kv_heads * self.head_dim + self.index_elements",
        "tests/model/attention/test_laws.py",
        "cache_bytes",
    ),
    Fault(
        "cached row is written one too far",
        "model/cache.py",
        "self._put(made_once(at.made, FullCache, lambda: at.positions.clamp(min=-1) + 1), fresh)",
        "self._put(made_once(at.made, FullCache, lambda: at.positions.clamp(min=-1) + 2), fresh)",
        "tests/model/test_cache.py",
        "full",
    ),
    Fault(
        "rolling cache keeps no rows to rewind to",
        "model/cache.py",
        "self.ring = window + SLACK",
        "self.ring = window",
        "tests/model/test_cache.py",
        "window",
    ),
    Fault(
        "one-token step rotates as at position zero",
        "model/flat_model.py",
        "rotary = {rope: tuple(of[position : position + 1][0] for of in rows) for rope, rows in self.rotary.items()}",
        "rotary = {rope: tuple(of[:1][0] for of in rows) for rope, rows in self.rotary.items()}",
        "tests/model/test_flat_model.py",
        "computes",
    ),
    Fault(
        "bits per byte are nats",
        "model/score.py",
        "return self.nats / (math.log(2) * self.text_bytes)",
        "return self.nats / self.text_bytes",
        "tests/training/test_training.py",
        "evaluate",
    ),
    Fault(
        "evaluation drops as training does",
        "model/score.py",
        "return chunked_losses(model(batch.inputs, Placement.of_batch(batch)).x, model.lm_head, batch.targets)",
        "return chunked_losses(model(batch.inputs, Placement.of_batch(batch), training=True).x, model.lm_head, "
        "batch.targets)",
        "tests/training/test_training.py",
        "dropout",
    ),
    Fault(
        "positions of decoding begin at zero again",
        "generation/decode.py",
        "positions = index.where(ahead < count[:, None], PADDING_POSITION)",
        "positions = ahead.where(ahead < count[:, None], PADDING_POSITION)",
        "tests/generation/test_decode.py",
        "uncached",
    ),
    Fault(
        "every token is drawn with the same noise",
        "generation/gumbel.py",
        "keys = mix(hashed_seeds + indices)",
        "keys = mix(hashed_seeds)",
        "tests/generation/test_gumbel.py",
        "drawn",
    ),
    Fault(
        "top-k keeps one too many",
        "generation/sampler.py",
        "kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]",
        "kth = logits.topk(min(k + 1, logits.shape[-1])).values[..., -1:]",
        "tests/generation/test_sampler.py",
        "filters",
    ),
    Fault(
        "drafts are accepted unseen",
        "generation/speculative.py",
        "if draws[place] != draft or draft == end_token:",
        "if draft == end_token:",
        "tests/generation/test_speculative.py",
        "kept",
    ),
    Fault(
        "targets are the inputs",
        "data/batches.py",
        "return Batch.of(tokens[:, :-1], tokens[:, 1:], document_start, counted)",
        "return Batch.of(tokens[:, :-1], tokens[:, :-1], document_start, counted)",
        "tests/data/test_shards_and_batches.py",
        "epoch",
    ),
    Fault(
        "prompts count",
        "data/shards/build.py",
        "for tokens, counts in ((end_before, 1), (prompt, 0), (text, 1)):",
        "for tokens, counts in ((end_before, 1), (prompt, 1), (text, 1)):",
        "tests/data/sources/test_prompts.py",
        "answers_and_their_ends",
    ),
    Fault(
        "keys count in the place of answers",
        "data/sources/examples.py",
        "of_example[list(self.answers())] = True",
        "of_example[[place - 1 for place in self.answers()]] = True",
        "tests/data/sources/test_examples.py",
        "counted_targets",
    ),
    Fault(
        "accuracy counts what is not the likeliest",
        "model/loss.py",
        "largest = [lm_head.logits(x[chunk]).argmax(-1) for chunk in _cut(len(x), rows)]",
        "largest = [lm_head.logits(x[chunk]).argmin(-1) for chunk in _cut(len(x), rows)]",
        "tests/model/test_loss.py",
        "accuracy",
    ),
    Fault(
        "every epoch has the same order",
        "data/order.py",
        "key = _mix(np.array([seed], np.uint64)) + np.uint64(epoch)",
        "key = _mix(np.array([seed], np.uint64))",
        "tests/data/test_shards_and_batches.py",
        "epoch",
    ),
    Fault(
        "one text can be in both splits",
        "data/sources/corpus.py",
        'return hash_sample(index if by == "index" else hashlib.sha256(text.encode()).hexdigest(), share)',
        "return hash_sample(index, share)",
        "tests/data/sources/test_split.py",
        "identical",
    ),
    Fault(
        "held-out end of a file is trained on",
        "data/sources/files.py",
        "for validation, first, stop in ((False, start, cut), (True, cut, size)):",
        "for validation, first, stop in ((False, start, size), (True, cut, size)):",
        "tests/data/sources/test_corpus.py",
        "hold_out",
    ),
    Fault(
        "gradient is not clipped",
        "training/step.py",
        "grad_norm = state.precision.clip(state.clip_norm or math.inf)",
        "grad_norm = state.precision.clip(math.inf)",
        "tests/training/test_training.py",
        "clip",
    ),
    Fault(
        "step with a NaN is taken",
        "training/step.py",
        "_step_unless(skipped, optimizer)",
        "_step_unless(torch.zeros_like(skipped), optimizer)",
        "tests/training/monitor/test_guard.py",
        "train_step",
    ),
    Fault(
        "micro-batches weigh alike whatever they count",
        "training/step.py",
        "parts = counted / counts[micro_step]  # of equal counts exactly their number: / N, not / n · n / N",
        "parts = len(batches)",
        "tests/training/test_training.py",
        "weighs",
    ),
    Fault(
        "micro-batches drop alike",
        "training/step.py",
        'digest = hashlib.sha256(f"{seeds}/{micro_step}".encode()).digest()',
        'digest = hashlib.sha256(f"{seeds}".encode()).digest()',
        "tests/training/test_training.py",
        "dropout",
    ),
    Fault(
        "vectors decay",
        "training/optim/adamw.py",
        '"weight_decay": 0.0 if layout.fan_in is None else self.weight_decay,',
        '"weight_decay": self.weight_decay,',
        "tests/training/test_training.py",
        "decay",
    ),
    Fault(
        "first step of the warmup has no rate",
        "training/optim/schedule.py",
        "return (step + 1) / (warmup_steps + 1)",
        "return step / (warmup_steps + 1)",
        "tests/training/test_training.py",
        "schedule",
    ),
    Fault(
        "metrics that cannot be written are passed over",
        "training/metrics_file.py",
        "yield",
        "with suppress(OSError): yield",
        "tests/training/test_faults.py",
        "full_disk",
    ),
    Fault(
        "resumed run repeats rows of metrics",
        "training/metrics_file.py",
        "rows = read_metrics(path, resume_after) if resume_after else []",
        "rows = read_metrics(path) if resume_after else []",
        "tests/training/monitor/test_log.py",
        "metrics",
    ),
    Fault(
        "optimizer state is not restored",
        "training/run/checkpoint.py",
        "together(world, lambda: load_optimizer(found, state), UserError)",
        "pass",
        "tests/training/run/test_resume.py",
        "attention_dropout",
    ),
    Fault(
        "resumed run leaves out a batch",
        "training/run/checkpoint.py",
        "state.step = found.manifest.step",
        "state.step = found.manifest.step + 1",
        "tests/training/run/test_resume.py",
        "attention_dropout",
    ),
    Fault(
        "checkpoint that cannot be written is passed over",
        "training/run/checkpoint.py",
        "write(path, run, corpus, state, files, val_loss)",
        "with suppress(OSError): write(path, run, corpus, state, files, val_loss)",
        "tests/training/test_faults.py",
        "checkpoint",
    ),
    Fault(
        "checksum of tensors is not compared",
        "training/run/tensor_files.py",
        "if checked and (content.read(1) or digest.hexdigest() != mark.sha256):",
        "if checked and content.read(1):",
        "tests/training/run/test_checkpoint.py",
        "damaged and older",
    ),
    Fault(
        "loss scale is not restored",
        "training/run/checkpoint.py",
        "state.loss_scale.load(found.manifest.loss_scale)",
        "pass",
        "tests/training/run/test_resume.py",
        "float16",
    ),
    Fault(
        "best checkpoint is removed",
        "training/run/checkpoint.py",
        "return [path for path in old if path in losses and path != lowest]",
        "return [path for path in old if path in losses]",
        "tests/training/run/test_checkpoint.py",
        "best and save",
    ),
    Fault(
        "p-values are not corrected",
        "ablation/statistics.py",
        "corrected = holm({name: test.p for name, test in tests.items() if test.p is not None})",
        "corrected = {name: test.p for name, test in tests.items() if test.p is not None}",
        "tests/ablation/test_statistics.py",
        "compare and corrects",
    ),
    Fault(
        "pooled spread has too many degrees of freedom",
        "ablation/statistics.py",
        "df = len(cells) - int(rank)",
        "df = len(cells) - len(table)",
        "tests/ablation/test_statistics.py",
        "paired or variance",
    ),
    Fault(
        "file is not on the disk before it has its name",
        "common/atomic_io.py",
        "os.fsync(file.fileno())",
        "pass",
        "tests/common/test_atomic_io.py",
        "write_atomic",
    ),
    Fault(
        "losing groups of experts are masked with zeros",
        "model/moe.py",
        "scores = groups.masked_fill(loses[:, :, None], -torch.inf).flatten(1)  # 0 may be more than a biased score",
        "scores = groups.masked_fill(loses[:, :, None], 0.0).flatten(1)",
        "tests/model/test_moe.py",
        "losing_groups",
    ),
    Fault(
        "the bias of experts goes by the last micro-batch alone",
        "training/balance.py",
        "reduce = staticmethod(torch.add)",
        "reduce = staticmethod(lambda before, load: load)",
        "tests/training/test_balance.py",
        "all_micro_batches",
    ),
]


@pytest.fixture
def copied(tmp_path):
    """A folder with the sources and tests, as they are now."""
    target = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "results", "compatibility")  # what is large, and no guard reads
    for folder in (*PACKAGES, "benchmarks", "conf", "tests"):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(file, target)
    return target


def run_tests(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the fast tests that the arguments of pytest name, in that folder and on the modules that lie there."""
    outer = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = outer | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none of them is needed, and some take seconds to import
    pytest_alone = ["-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command = [sys.executable, *pytest_alone, "-m", FAST, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS)


def selected(fault: Fault) -> str:
    """The tests of the fault's guard, as -k takes them."""
    file = Path(fault.guard).name
    return f"({file} and ({fault.words}))" if fault.words else file


def plant(fault: Fault, folder: Path) -> None:
    """Write the fault into its file in that folder. Raises AssertionError as `place_of` does."""
    lines, place = place_of(fault, folder)
    lines[place] = lines[place].replace(fault.line, fault.becomes)
    (folder / fault.file).write_text("\n".join(lines) + "\n")


def place_of(fault: Fault, folder: Path) -> tuple[list[str], int]:
    """The lines of the fault's file, and which it changes. Raises AssertionError where it is not there exactly once."""
    lines = (folder / fault.file).read_text().splitlines()
    places = [i for i, line in enumerate(lines) if line.strip() == fault.line]
    assert len(places) == 1, f"{fault.file} has {len(places)} times, not once, the line to be changed: {fault.line}"
    return lines, places[0]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_line_of_a_planted_fault_is_in_its_file(fault):
    assert place_of(fault, ROOT) and (ROOT / fault.guard).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_fast_tests_with_a_planted_fault_fail(copied, fault):
    plant(fault, copied)
    found = run_tests(copied, fault.guard, "-k", selected(fault))
    output = found.stdout + found.stderr
    print(output)  # -rP shows which test caught it, and by what
    assert found.returncode != PASSED, f"{fault.guard} passes in spite of the fault in {fault.file}: {fault.becomes}"
    assert found.returncode == FAILED and " failed" in output, f"{fault.guard} could not be run:\n{output}"


@pytest.mark.slow
def test_fast_tests_without_a_fault_pass(copied):
    files = dict.fromkeys(fault.guard for fault in FAULTS)
    found = run_tests(copied, *files, "-k", " or ".join(dict.fromkeys(map(selected, FAULTS))))
    assert found.returncode == PASSED, found.stdout + found.stderr


@pytest.mark.slow
def test_copy_imports_its_own_modules(copied):
    """Whatever is installed, or on the path of the tests around this one."""
    (copied / "tests" / "test_imports.py").write_text(IMPORTS.format(modules=[*PACKAGES, "train", "tests.support"]))
    found = run_tests(copied, "tests/test_imports.py")
    assert found.returncode == PASSED, found.stdout + found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", ["no such line", ""])
def test_plant_where_the_line_is_not_there_once_is_refused(copied, line):
    with pytest.raises(AssertionError, match="times, not once, the line to be changed"):
        plant(FAULTS[0]._replace(line=line), copied)
