"""Imports between packages: which may use which, and the order of the files within one."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {  # each with the rooms that it may use, besides itself
    "common": set(),
    "model": {"common"},
    "data": {"common"},
    "runtime": {"common"},
    "training": {"common", "model", "data", "runtime"},
    "generation": {"common", "model", "data", "runtime"},
}
DOORS = ("train", "sample")
# Within a room: a file uses only what stands before it in its room's list. Files and folders that are not named are
# free, as long as no circle comes of it.
ORDER = {
    "model": "dimensions layout linear mask norm rope cache positions kernels mlp attention transformer loss cost",
    "data": "tokenizers sources shards batches",
}
FORBIDDEN = {
    "common": {"torch", "numpy", "datasets", "wandb"},
    "model": {"hydra", "omegaconf", "wandb", "datasets", "torch.distributed"},
    "data": {"torch.nn", "hydra", "omegaconf", "wandb"},
    "runtime": {"hydra", "omegaconf", "wandb", "datasets"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


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
IMPORTS = {name: imports_of(path) & FILES.keys() for name, path in FILES.items()}


def test_every_room_uses_only_the_rooms_below_it():
    for name, imports in IMPORTS.items():
        room = name.partition(".")[0]
        used = {imported.partition(".")[0] for imported in imports} - {room}
        assert used <= ROOMS.get(room, set(ROOMS)), f"{name} imports {sorted(imports)}"


def test_no_file_imports_itself_over_others():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle of imports: {' -> '.join((*above, name))}"
        if name not in done:
            for imported in sorted(IMPORTS[name]):
                visit(imported, (*above, name))
            done.add(name)

    for name in IMPORTS:
        visit(name, ())


def test_the_files_of_a_room_stand_in_its_order():
    for room, order in ORDER.items():
        places = {name: place for place, name in enumerate(order.split())}
        assert all((ROOT / room / name).is_dir() or (ROOT / room / f"{name}.py").is_file() for name in places)
        for name, imports in IMPORTS.items():
            own = places.get(name.split(".")[1]) if name.startswith(f"{room}.") else None
            for imported in imports if own is not None else ():
                other = places.get(imported.split(".")[1]) if imported.startswith(f"{room}.") else None
                assert other is None or other <= own, f"{name} imports {imported}"


def test_rooms_do_not_know_what_is_not_theirs():
    for room, forbidden in FORBIDDEN.items():
        for path in (ROOT / room).rglob("*.py"):
            known = imports_of(path)
            assert not {name for name in known if any(f"{name}.".startswith(f"{one}.") for one in forbidden)}, path


def test_benchmarks_import_no_tests():
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        assert not {name for name in imports_of(path) if name.partition(".")[0] == "tests"}, path


def test_no_top_level_file_shadows_a_standard_module():
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert not ours & sys.stdlib_module_names
