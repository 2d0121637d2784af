"""The examples run, print what they say, and stay short; here on small pictures and with few steps."""

import ast
import re
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

import jupytext
import pytest
from PIL import Image

import freqdoor
from freqdoor import samples
from freqdoor.defence.checks import CHECKS
from freqdoor.triggers.arguments import TRIGGERS

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = {"poison_photo": "", "rd_curves": "qualities, codec_steps, plant_steps, batch_size = (1, 2, 4, 6), 2, 1, 1"}
SCRIPTS = {"audit_checkpoint": [], "new_check": [], "new_trigger": ["2"], "own_codec": ["2"]}


def promised(name: str) -> list[re.Pattern[str]]:
    """The lines that an example says it prints, with any numbers."""
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text())) or ""
    lines = re.findall(r"^    (.+)$", text, re.MULTILINE)
    return [re.compile(re.sub(r"(\\-)?\d[\d.]*", r"[-\\d.]+", re.escape(line).replace(r"\.", "."))) for line in lines]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Work in an empty folder, on one small held-out picture and two to plant on."""
    for kind, name in (("planted-on", "kodim01.png"), ("planted-on", "kodim02.png"), ("held-out", "kodim20.png")):
        (tmp_path / kind).mkdir(exist_ok=True)
        with Image.open(samples.KODAK / name) as picture:
            picture.reduce(3).save(tmp_path / kind / name)
    monkeypatch.setattr(samples, "held_out", lambda: [tmp_path / "held-out/kodim20.png"])
    monkeypatch.setattr(samples, "training_folder", lambda out: tmp_path / "planted-on")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(TRIGGERS, "wave", None)  # so that what the examples enter is taken out again
    monkeypatch.setitem(CHECKS, "boards", None)


def test_examples_are_short_and_each_is_run_here():
    lengths = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lengths.keys() == {*NOTEBOOKS, *SCRIPTS, "guard_service"}
    assert max(lengths.values()) <= 60
    assert all(promised(name) for name in lengths)


@pytest.mark.long
@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore:own_codec.make. this codec has no quality")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_what_it_says(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *SCRIPTS[name]])
    with pytest.raises(SystemExit, match=r"^1$") if name == "audit_checkpoint" else nullcontext():
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    if name in ("new_trigger", "own_codec"):  # after two steps no attack succeeds, and the verdict says so
        assert re.match(r"On 1 images? the tampered encoder .* did not succeed", lines[-1])
    else:
        assert all(any(line.fullmatch(said) for said in lines) for line in promised(name)), lines


@pytest.mark.long
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_cell_by_cell(name, capsys):
    cells = jupytext.read(EXAMPLES / f"{name}.py").cells
    assert {cell.cell_type for cell in cells} == {"code", "markdown"}
    names: dict[str, object] = {}
    for cell in cells:
        if cell.cell_type == "code":
            exec(NOTEBOOKS[name] if "parameters" in cell.metadata.get("tags", ()) else cell.source, names)
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.fullmatch(said) for said in lines) for line in promised(name)), lines


@pytest.mark.long
@pytest.mark.usefixtures("small")
def test_the_service_stops_a_poisoned_picture_and_says_what_it_cannot_use(monkeypatch):
    testclient = pytest.importorskip("starlette.testclient", reason="FastAPI is not installed")
    service = runpy.run_path(str(EXAMPLES / "guard_service.py"))
    client = testclient.TestClient(service["app"])
    [photo] = samples.held_out()
    x = freqdoor.load_image(photo)
    freqdoor.save_image("poisoned.png", freqdoor.poisoned(freqdoor.load_planted("planted-bpp").triggers["bpp"], x))
    answers = {name: client.post("/compress", content=Path(name).read_bytes()) for name in (str(photo), "poisoned.png")}
    decisions = [answer.headers["x-guard"] for answer in answers.values()]
    assert decisions[0].startswith("passed")
    assert promised("guard_service")[-1].fullmatch(f"x-guard: {decisions[1]}")
    for answer in answers.values():
        Path("sent.fqd").write_bytes(answer.content)
        freqdoor.decompress("sent.fqd", "shown.png", force=True)
        assert freqdoor.load_image("shown.png").shape == x.shape
    refused = client.post("/compress", content=b"no picture")
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith("picture.png: ")
    monkeypatch.setitem(service["compress"].__globals__, "LARGEST", 10)
    assert client.post("/compress", content=photo.read_bytes()).status_code == 413
