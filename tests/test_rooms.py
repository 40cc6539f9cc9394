"""The house: which room may import which. docs/design/layout.md describes it."""

import ast
import graphlib
import pathlib
from collections.abc import Iterator

import pytest
from conftest import ROOT

# Room -> the rooms that it may import, all of them below it. A file that stands in no folder is a room of its own.
ROOMS: dict[str, set[str]] = {
    "distill": set(),
    "upstream": set(),
    "console": set(),
    "chips": set(),
    "compiled": {"chips"},
    "config": {"upstream", "console"},
    "cache": {"config", "console"},
    "data": {"cache", "config", "upstream", "console"},
    "models": {"chips", "distill", "data", "cache", "config", "upstream", "console"},
    "text": {"config", "upstream", "console"},
    "reports": {"config", "upstream", "console"},
    "sweeps": {"config", "upstream", "console"},
    "cluster": {"config", "upstream", "console"},
    "checkpoints": {"config", "upstream", "console"},
    "huggingface": {"checkpoints", "models", "config", "upstream", "console"},
    "loop": {"chips", "models", "distill", "data", "cache", "config", "upstream", "console"},
}
ROOMS["pruning"] = set(ROOMS) - {"text", "reports", "sweeps", "cluster", "compiled"}
BELOW = set(ROOMS)
ROOMS |= {
    "train": BELOW,
    "cache_teacher": BELOW,
    "train_compile": BELOW | {"train"},
    "benchmarks": BELOW | {"train", "train_compile"},
}
ROOMS |= {"scripts": set(ROOMS)}


def files() -> Iterator[pathlib.Path]:
    for folder in ("MaxText", "scripts"):
        yield from (file for file in (ROOT / folder).rglob("*.py") if file.name != "__init__.py")


def module_of(file: pathlib.Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_of(file): file for file in files()}


def imports(file: pathlib.Path) -> set[str]:
    """The modules that a file imports, also where it does so late."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member for member in members if member in MODULES} or {node.module}
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "scripts" else parts[1]


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_rooms_below_it(module):
    own = room(module)
    assert own in ROOMS, f"{own}: a room that no rule knows"
    ours = {room(name) for name in imports(MODULES[module]) if name.startswith("MaxText.")}
    assert ours <= ROOMS[own] | {own}


def test_no_import_leads_back():
    graphlib.TopologicalSorter({name: imports(file) & MODULES.keys() for name, file in MODULES.items()}).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_only_one_module_imports_the_engine(module):
    engine = {name for name in imports(MODULES[module]) if name.split(".")[0] == "maxtext"}
    assert not engine or module == "MaxText.upstream"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("MaxText.distill.")])
def test_the_mathematics_imports_arrays_alone(module):
    others = {name.split(".")[0] for name in imports(MODULES[module]) if not name.startswith("MaxText.distill")}
    assert others <= {"abc", "collections", "dataclasses", "functools", "math", "typing", "jax", "jaxtyping"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("scripts.")])
def test_a_command_is_short_and_imports_no_other(module):
    file = MODULES[module]
    assert len(file.read_text().splitlines()) < 200
    siblings = {path.stem for path in (ROOT / "scripts").rglob("*.py") if path.parent == file.parent}
    in_a_room = file.parent.name != "scripts"
    assert in_a_room or not siblings & {name.split(".")[0] for name in imports(file)}


def test_every_room_is_installed():
    import tomllib

    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    rooms = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "MaxText").rglob("*.py")}
    assert packages == rooms
