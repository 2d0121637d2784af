"""The shape of the package: imports go one way, files stay small, a few things are not written."""

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "freqdoor"
LAYERS = [  # a module may import from the layers above it, and from its own
    {"types", "dct", "files", "settings"},
    {"metrics", "config", "lite", "checkpoint", "defences"},
    {"codecs", "data", "testsets"},
    {"loading", "container", "triggers", "downstream"},
    {"victims"},
    {"objectives"},
    {"loop", "robust", "planted", "joint"},
    {"train", "plant"},
    {"evaluate", "report"},
    {"examine", "analysis", "recipes", "pgd", "segmentation", "faces", "watermark"},
    {"demo", "tables", "downstream_recipes"},
    {"reproduce"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__main__.py",) and p != PACKAGE / "__init__.py")


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_one_way():
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("freqdoor."):
                names = [node.module.split(".")[1]]
            elif isinstance(node, ast.Import):
                names = [a.name.split(".")[1] for a in node.names if a.name.startswith("freqdoor.")]
            wrong += [(path.name, n) for n in names if RANK[n] > RANK[module_of(path)]]
    assert not wrong


def test_report_loads_no_codec():
    text = (PACKAGE / "report.py").read_text()
    assert "freqdoor.codecs" not in text
    assert "freqdoor.plant" not in text


def test_files_stay_small():
    assert not [(p.name, n) for p in FILES if (n := len(p.read_text().splitlines())) > 350]


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
