"""What a user can reach: the public names, the verbs, and that both are one thing."""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import freqdoor
from freqdoor.cli import app

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parent.parent
VERBS = {command.name: command.callback for command in app.registered_commands}
HEAVY = ("torch", "numpy", "PIL", "compressai", "torchvision", "matplotlib", "scipy", "jinja2", "cv2", "onnx")
# what a verb calls it, and the function: files of settings are read by the command line, objects are shown by it
OF_THE_COMMAND_LINE = {"config", "overrides", "others", "json"}
OF_THE_FUNCTION = {"settings", "note", "progress", "announce"}
ENDS_AT_ONCE = [
    ("--help",),
    ("--version",),
    (),
    *((name, "--help") for name in VERBS),
    ("plant", "--no-such-option"),
    ("plant", "--out", "run", "--set", "steps=many"),
    ("plant", "--out", "run", "--set", "images.folder=x", "--set", "trigger.arguments.top_k=0"),
    ("plant", "--out", "run", "--set", "images.folder=x", "--set", "robust.scored_by=Jpeg(999)"),
    ("train-codec", "--out", "run", "--set", "images.crop=63"),
    ("segment", "planted-bpp", "--out", "out"),
    ("faces", "planted-face", "--out", "out", "--set", "every=0"),
    ("reproduce", "table4", "--set", "steps=many"),
    ("list", "codecs", "--json"),
]
MAIN = "from freqdoor.__main__ import main; sys.argv = {!r}; main()"


def modules_after(codes: list[str]) -> dict[str, set[str]]:
    """Which heavy modules are loaded after each of some pieces of code, run one after the other in one process."""
    script = (
        "import sys\n"
        f"for code in {codes!r}:\n"
        "    try:\n        exec(code)\n    except SystemExit:\n        pass\n"
        f"    print('after', code, *[name for name in {HEAVY!r} if name in sys.modules], sep='\\t')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("after\t")]
    assert [code for _, code, *_ in lines] == codes
    return {code: set(loaded) for _, code, *loaded in lines}


def test_what_ends_at_once_loads_nothing_heavy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = modules_after([MAIN.format(["freqdoor", *words]) for words in ENDS_AT_ONCE])
    assert {code: modules for code, modules in loaded.items() if modules} == {}  # the first named is the one that loads


def test_importing_freqdoor_loads_nothing_heavy():
    code = "import freqdoor; freqdoor.PlantSettings; freqdoor.FaceTest; dir(freqdoor)"
    assert modules_after([code]) == {code: set()}


@pytest.mark.long
def test_a_verb_loads_what_it_needs_and_no_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = ROOT / "freqdoor/assets/kodak/kodim23.png"
    code = MAIN.format(["freqdoor", "compress", str(picture), "x.fqd"])
    assert modules_after([code])[code] == {"torch", "numpy", "PIL", "compressai", "scipy"}
    script = (
        "import sys, warnings; from freqdoor import load_codec; load_codec('lite-hyperprior:3');"
        "slow = ('scipy.stats', 'scipy.special', 'torch._dynamo', 'torchvision', 'sympy');"
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.long
def test_compressai_is_whole_for_others():
    """What is left out while CompressAI is imported comes when somebody asks for it."""
    script = (
        "import freqdoor.codecs, compressai, compressai.models;"
        "assert compressai.datasets.ImageFolder; from compressai.transforms import RGB2YCbCr;"
        "from compressai.datasets import Vimeo90kDataset; import scipy.stats; assert scipy.stats.norm.ppf(0.5) == 0;"
        "import torchvision.transforms; assert torchvision.transforms.ToTensor; import torch_geometric"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_the_function_of_its_name(name):
    # `from freqdoor import *` must not hide Python's own list
    function = getattr(freqdoor, "names" if name == "list" else name.replace("-", "_"))
    assert inspect.isfunction(function)
    of_verb = set(inspect.signature(VERBS[name]).parameters) - OF_THE_COMMAND_LINE
    of_function = set(inspect.signature(function).parameters) - OF_THE_FUNCTION
    if name in ("segment", "faces"):
        of_function -= {"test"}  # the command line's config
    assert of_verb == of_function


def test_public_names_exist_and_shadow_no_module():
    for name in freqdoor.__all__:
        assert getattr(freqdoor, name) is not None
        assert importlib.util.find_spec(f"freqdoor.{name}") is None, f"freqdoor.{name} is a module too"
    assert set(freqdoor.__all__) <= set(dir(freqdoor))
    with pytest.raises(AttributeError):
        freqdoor.no_such_name  # noqa: B018


def test_every_verb_is_in_a_documented_block_that_the_tests_run():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = "".join(
        block for page in pages for block in re.findall(r"<!-- \w+ -->\n```sh\n(.*?)```", page.read_text(), re.DOTALL)
    )
    assert {verb for verb in VERBS if not re.search(rf"freqdoor {verb}\b", blocks)} == set()
