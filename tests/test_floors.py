"""The plan of the house: a file imports only from the files listed before it."""

import ast
import sys
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    "model.config model.errors",
    "model.blocks model.linear model.mask model.norm model.rope model.sampler",
    "model.cache model.positions",
    "model.kernels.base",
    "model.kernels.naive model.kernels.sdpa model.kernels.online",
    "model.kernels.flex model.kernels.matmul model.kernels.scores",
    "model.kernels.auto",
    "model.attention.base",
    "model.attention.* model.mlp",
    "model.transformer",
    "model.generate model.cost",
    "data.errors data.config data.json_values data.patterns",
    "training.invocation training.streams training.signals",
    "training.process training.unknown",
    "data.durable data.names data.sealed",
    "data.paths",
    "data.lock data.vocabulary",
    "data.corpus data.tokenizer data.tables",
    "data.kinds data.contents",
    "data.files data.hub data.mix data.published data.shards",
    "data.build",
    "data.prepare",
    "data.batches",
    "training.cgroup",
    "training.allocator training.compilation training.completion training.device training.fp8 training.guard",
    "training.log",
    "training.picture",
    "training.command training.overrides",
    "training.loss training.streaming training.sampling_options training.mfu training.profiling",
    "training.qk_clip",
    "training.optim training.precision training.schedule training.plot",
    "training.orthogonal",
    "training.step training.preview training.muon",
    "training.scoring training.repl training.writing training.attention_seen training.attention_map",
    "training.config training.migrate",
    "training.origin training.epochs",
    "training.run_folder",
    "training.checkpoint training.dry_run",
    "training.report",
    "training.trained training.beginning",
    "training.replay",
    "train sample",
]
FORBIDDEN_IN_MODEL = {"data", "training", "hydra", "omegaconf", "wandb", "datasets"}
PACKAGES = [path for name in ("model", "data", "training") for path in sorted((ROOT / name).rglob("*.py"))]
FILES = [path for path in [*PACKAGES, ROOT / "train.py", ROOT / "sample.py"] if path.name != "__init__.py"]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor_of(module: str) -> int:
    exact = [i for i, floor in enumerate(FLOORS) if module in floor.split()]
    return (exact or [i for i, floor in enumerate(FLOORS) if any(fnmatch(module, p) for p in floor.split())])[0]


def test_every_file_imports_only_from_lower_floors():
    names = {name_of(path) for path in FILES}
    for path in FILES:
        for imported in imports_of(path) & names:
            assert floor_of(imported) < floor_of(name_of(path)), f"{name_of(path)} imports {imported}"


def test_the_model_knows_nothing_of_data_training_or_configuration():
    for path in (ROOT / "model").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & FORBIDDEN_IN_MODEL, path
        assert not any(name.startswith("torch.distributed") for name in imports_of(path)), path


def test_no_top_level_file_shadows_a_standard_module():
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert not ours & sys.stdlib_module_names
