"""Imports between packages: which may use which, and the order of the files within one."""

import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {  # each with the rooms that it may use, besides itself
    "common": set(),
    "model": {"common"},
    "data": {"common"},
    "runtime": {"common"},
    "training": {"common", "model", "data", "runtime"},
    "generation": {"common", "model", "data", "runtime"},
    "ablation": {"common", "model", "data", "runtime", "training", "generation"},
    "interchange": {"common", "model", "data", "runtime", "training", "generation"},
}
DOORS = ("train", "sample", "compare", "convert")
# Within a folder: a file uses only what stands before it in the folder's list. Names that are not in it are free, as
# long as no circle comes of it. A name with a dot is a file of a subfolder that stands apart from the rest of it.
ORDER = {
    "common": "errors hf_names settings ranks signals experimental atomic_io checksummed_json json_files plain_yaml "
    "invocation streams console lock paths figures conf_files suggestions overrides hydra_errors process cli",
    "model": "dimensions layout linear mask norm mtp rope cache placement context positions kernels grouped flat_step "
    "mlp attention moe transformer published flat_model initialise loss cost",
    "data": "tokenizers sources report shards order batches prefetch",
    "training": "parallel.spread optim parallel.config metrics_file loggers run.composer run.validation_errors "
    "run.parts run.config run.processes experimental_settings large_rates epochs compile losses balance parallel.fsdp "
    "parallel.plan state parallel.gather parallel.imagined evaluate attention_stats expert_loads step run "
    "parallel.join parallel.launch measure monitor session step_memory step_time minutes text_lines dry_run",
    "ablation": "outcome statistics results match records curves decoding sweep pages report probes",
    "ablation.sweep": "stored grid pace launch request plan run",
    "ablation.pages": "formats words palette axes series columns terminal tables markdown tags charts html pictures "
    "files",
    "training.optim": "newton_schulz qk_clip groups base adamw muon torch_optim schedule",
    "training.loggers": "base tensorboard wandb",
    "training.run": "composer validation_errors parts config conf_differences settings_page migrate changes signature "
    "folder resume tensor_files checkpoint published load start replay",
    "training.monitor": "timer guard mfu plot plot_experts profiler progress summary final_lines monitor",
}
FORBIDDEN = {
    "common": {"torch", "numpy", "datasets", "wandb"},
    "model": {"hydra", "omegaconf", "wandb", "datasets", "torch.distributed"},
    "data": {"torch.nn", "hydra", "omegaconf", "wandb"},
    "runtime": {"hydra", "omegaconf", "wandb", "datasets"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Modules, and what is taken from them, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = {
    name_of(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) if path.name != "__init__.py"
} | {door: ROOT / f"{door}.py" for door in DOORS}


@functools.cache
def all_imports() -> dict[str, set[str]]:
    """Of our files, those of our files."""
    return {name: imports_of(path) & FILES.keys() for name, path in FILES.items()}


def test_imports_of_a_room_are_of_rooms_below_it():
    for name, imports in all_imports().items():
        room = name.partition(".")[0]
        used = {imported.partition(".")[0] for imported in imports} - {room}
        assert used <= ROOMS.get(room, set(ROOMS)), f"{name} imports {sorted(imports)}"


def test_imports_form_no_circle():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle of imports: {' -> '.join((*above, name))}"
        if name not in done:
            for imported in sorted(all_imports()[name]):
                visit(imported, (*above, name))
            done.add(name)

    for name in all_imports():
        visit(name, ())


def place_in(order: list[str], folder: str, module: str) -> int | None:
    """The place of a module in its folder's list, by the longest name there that it begins with."""
    inside = module.removeprefix(f"{folder}.")
    known = [name for name in order if f"{inside}.".startswith(f"{name}.")]
    return order.index(max(known, key=len)) if known and inside != module else None


def test_imports_within_a_folder_follow_its_order():
    for folder, text in ORDER.items():
        order = text.split()
        paths = [ROOT.joinpath(*folder.split("."), *name.split(".")) for name in order]
        assert all(path.is_dir() or path.with_suffix(".py").is_file() for path in paths), folder
        for name, imports in all_imports().items():
            own = place_in(order, folder, name)
            for imported in imports if own is not None else ():
                other = place_in(order, folder, imported)
                assert other is None or other <= own, f"{name} imports {imported}"


@pytest.mark.parametrize("folder", ["common", "training", "ablation"])
def test_order_of_a_folder_has_a_place_for_every_file(folder):
    order = ORDER[folder].split()
    assert not [name for name in FILES if name.startswith(f"{folder}.") and place_in(order, folder, name) is None]


def test_imports_of_a_room_are_of_packages_it_may_know():
    for room, forbidden in FORBIDDEN.items():
        for path in (ROOT / room).rglob("*.py"):
            known = imports_of(path)
            assert not {name for name in known if any(f"{name}.".startswith(f"{one}.") for one in forbidden)}, path


def test_imports_of_scipy_are_those_of_the_statistics_alone():
    users = {name for name, path in FILES.items() if any(f"{one}.".startswith("scipy.") for one in imports_of(path))}
    assert users == {"ablation.statistics"}


def test_imports_of_benchmarks_are_of_no_tests():
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        assert not {name for name in imports_of(path) if name.partition(".")[0] == "tests"}, path


def test_top_level_names_shadow_no_standard_module():
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert not ours & sys.stdlib_module_names
