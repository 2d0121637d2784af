"""docs/equations.md is true: every file, name and test in it exists, and what is named says its equation."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "freqdoor"
TEXT = (ROOT / "docs/equations.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| equation")
]


def documented(path: Path) -> dict[str, str]:
    """Functions and classes of a file, methods as Class.method, with their docstrings."""
    names = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = ast.get_docstring(node) or ""
            for child in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(child, ast.FunctionDef):
                    names[f"{node.name}.{child.name}"] = ast.get_docstring(child) or ""
    return names


def numbers(text: str) -> set[int]:
    """Equations in a text such as "Eq. (9), (10)"."""
    runs = re.findall(r"Eq\. (\(\d+\)(?:(?:, | and | or )\(\d+\))*)", text)
    return {int(number) for run in runs for number in re.findall(r"\d+", run)}


def references(cell: str, folder: Path) -> list[tuple[Path, str | None]]:
    """(file, name) of every `file.py: name` in a cell; a name without a file is in the file before it."""
    pairs: list[tuple[Path, str | None]] = []
    for code in re.findall(r"`([^`]+)`", cell):
        file, _, name = code.partition(": ")
        if file.endswith(".py"):
            pairs.append((folder / file, name or None))
        elif file.startswith("test_"):
            pairs.append((pairs[-1][0], file))
    return pairs


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_rows_name_what_exists_and_says_its_equation(row):
    title, code, tests = row
    places = references(code, PACKAGE)
    assert places
    said: set[int] = set()
    for path, name in places:
        assert path.is_file(), path
        assert name is None or name in documented(path), (path, name)
        said |= numbers(documented(path)[name] if name else path.read_text())
    assert numbers(title) <= said
    for path, name in references(tests, ROOT / "tests"):
        assert path.is_file(), path
        assert name is None or name in documented(path), (path, name)


def test_every_equation_of_the_paper_has_a_row():
    assert set().union(*(numbers(row[0]) for row in ROWS)) >= set(range(1, 14))


def test_names_in_the_prose_exist():
    for file, name in re.findall(r"`([\w/]+\.py): (\w+)`", TEXT):
        path = (ROOT / "tests" if file.startswith("test_") else PACKAGE) / file
        assert name in documented(path), (file, name)
    for path in re.findall(r"`(benchmarks/\w+\.py)`|\((docs/[\w/]+\.md)\)", TEXT):
        assert (ROOT / (path[0] or path[1])).is_file(), path


def test_one_spelling_of_equations():
    """A search for "Eq. (6)" finds every place: no other spelling is used."""
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/**/*.toml")]
    for path in files:
        assert not re.search(r"\b[Ee]qs?\. ?\d|\b[Ee]quation \(?\d", path.read_text()), path


def test_the_reading_order_is_short():
    files = re.findall(r"^\d\. `([\w/]+\.py)`", (ROOT / "docs/reading.md").read_text(), re.MULTILINE)
    assert len(files) == 6
    assert sum(len((PACKAGE / file).read_text().splitlines()) for file in files) <= 1000
