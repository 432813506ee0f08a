"""The package's rooms stand one above the other: what is imported is always below."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "effvit"
# From the ground up. A room may import itself and what stands before it.
ROOMS = [
    "",  # the files at the top
    "kernels",
    "attention",
    "model",
    "adapters",
    "data",
    "training",
    "evaluation",
    "analysis",
    "measure",
    "study",
    "deploy",
    "figures",
    "report",
    "notebook",
    "cli",
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(file):
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def room_of(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else ""


MODULES = {name_of(file) for file in FILES}


def imports_of(file, inside_functions=True):
    """Modules of the package that a file imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if inside_functions else tree.body
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("effvit"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("effvit."))


def test_every_folder_is_a_room():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(ROOMS)


def test_few_files_stand_at_the_top():
    assert len([file for file in PACKAGE.glob("*.py") if file.name != "__init__.py"]) <= 8


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_is_imported_from_a_higher_room(file):
    height = ROOMS.index(room_of(name_of(file)))
    higher = {name for name in imports_of(file) if ROOMS.index(room_of(name)) > height}
    assert not higher


def test_no_circle_of_imports():
    graph = {name_of(file): set(imports_of(file)) - {name_of(file)} for file in FILES}
    assert list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_what_every_training_runs_imports_no_single_mechanism():
    """Or a change of that mechanism's file would have a say in the cells of all others."""
    common = {"effvit.attention", "effvit.attention.base"}
    for file in FILES:
        if room_of(name_of(file)) in ("model", "data", "training", "evaluation", "deploy"):
            mechanisms = {name for name in imports_of(file) if name.startswith("effvit.attention")} - common
            assert not mechanisms, file
