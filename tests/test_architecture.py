"""The shape of the package: imports go one way, files stay small, a few things are not written."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parent.parent / "freqdoor"
RANKS: list[set[str]] = [  # what is in a row may import from the rows above it
    {"errors", "limits", "types", "files", "lock", "parts", "settings", "shards", "arrow"}
    | {"dct", "metrics", "data", "notes", "plots", "preprocessing", "samples"},
    {"codecs"},
    {"triggers", "training"},
    {"workers"},
    {"attack"},
    {"measure"},
    {"defence"},
    {"paper"},
    {"demonstration", "exchange", "listing"},
    {"web"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__main__.py",) and p != PACKAGE / "__init__.py")


def folder_of(name: str) -> str:
    """The folder, or file at the top, of a module's dotted name."""
    return name.split(".")[1]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Dotted names of the package's modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "freqdoor":
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "freqdoor"}
    return names & NAMES


NAMES = {name_of(path) for path in FILES}
IMPORTED = {name_of(path): imported(path) - {name_of(path)} for path in FILES}


def test_imports_go_from_row_to_row():
    wrong = [
        (name, other)
        for name, others in IMPORTED.items()
        for other in others
        if RANK[folder_of(other)] > RANK[folder_of(name)]
        or (RANK[folder_of(other)] == RANK[folder_of(name)] > 0 and folder_of(other) != folder_of(name))
    ]
    assert not wrong


def test_no_imports_go_round_in_a_circle():
    graph = {
        name: {other for other in others if other.count(".") > 1 or RANK[folder_of(other)] == 0}
        for name, others in IMPORTED.items()
    }
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_report_loads_no_codec():
    text = (PACKAGE / "measure/report.py").read_text()
    assert "freqdoor.codecs" not in text
    assert set(re.findall(r"freqdoor\.attack[.\w]*", text)) == {"freqdoor.attack.settings"}  # which loads no torch


def test_what_is_not_written():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"torch\.load\((?!.*weights_only=True)", text), path
        assert not re.search(r"^\s*(except:|print\(|global )", text, re.MULTILINE), path


def test_equations_are_found_by_their_number():
    text = "".join(p.read_text() for p in FILES)
    for number in (1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13):
        assert f"Eq. ({number})" in text


def test_import_has_no_side_effect():
    code = (
        "import torch, warnings; warnings.simplefilter('ignore');"
        "before = (torch.get_num_threads(), torch.random.get_rng_state().sum().item());"
        "import freqdoor;"
        "assert before == (torch.get_num_threads(), torch.random.get_rng_state().sum().item())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("folder", ["tools", "benchmarks", "examples"])
def test_what_scripts_import_of_the_package_is_there(folder):
    """They are run by hand, and nothing else says when a name that they use has moved."""
    lacking = []
    for path in sorted((PACKAGE.parent / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "freqdoor":
                module = importlib.import_module(node.module)
                lacking += [f"{path.name}: {node.module}.{a.name}" for a in node.names if not has(module, a.name)]
    assert not lacking


def has(module: ModuleType, name: str) -> bool:
    """Whether a module has a name, or is a package with a module of that name."""
    return hasattr(module, name) or find_spec(f"{module.__name__}.{name}") is not None
