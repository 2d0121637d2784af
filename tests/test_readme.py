"""The commands in README and docs run, and README's quick demo shows what it says."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import natural, open_loops, write_png
from networks import face_onnx, segmentation_onnx
from PIL import Image

import freqdoor.cli as cli
from freqdoor import load_codec, load_planted, poison, save_codec, workers

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parent.parent
PAGES = "".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "freqdoor", *arguments], capture_output=True, text=True, cwd=cwd, timeout=900
    )


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a documented line in this process, in the folder where the user would be."""

    def call(line: str, more: dict[str, list[str]]) -> None:
        words = shlex.split(line)
        assert words[0] == "freqdoor"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [*words, *more.get(words[1], [])])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, (line, capsys.readouterr().err)

    return call


def block(marker: str) -> list[str]:
    """The lines of the code block behind an HTML comment."""
    [code] = re.findall(rf"<!-- {marker} -->\n```\w*\n(.*?)```", PAGES, re.DOTALL)
    joined = code.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def put_photo(folder: Path, name: str = "kodim23.png") -> None:
    """A bundled picture in a third of its size: what is tested is that the commands work together, and soon."""
    (folder / "photos").mkdir()
    with Image.open(ROOT / "freqdoor/assets/kodak" / name) as picture:
        picture.reduce(3).save(folder / "photos" / name)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["bpp", "psnr"])
def test_quick_demo_reaches_what_the_planted_encoders_promise(objective, tmp_path):
    done = run("demo", "--quick", "--objective", objective, "--out", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    check_limits(summary)
    if objective == "bpp":
        assert summary["bpp_ratio"] >= 8
    else:
        assert summary["poisoned_8bit"]["psnr_db"] <= 5
    assert len(list((tmp_path / "demo/poisoned").iterdir())) == 6
    assert (tmp_path / "demo/report.html").stat().st_size > 100_000


def check_limits(summary: dict) -> None:
    assert summary["images"] == 6
    assert summary["changed_modules"] == ["g_a"]
    assert summary["trigger_psnr_db_worst"] >= 46
    assert summary["trigger_mse_worst"] <= 2.5e-5
    assert summary["clean_cost_db"] <= 0.3
    assert summary["clean_cost_bpp_percent"] <= 6
    if summary["objective"] == "psnr":
        assert summary["bpp_ratio"] <= 1.1


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["bpp", "psnr"])
def test_demo(objective, tmp_path):
    done = run("demo", "--objective", objective, "--out", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    check_limits(summary)
    if objective == "bpp":
        assert summary["bpp_ratio"] >= 4
    else:
        assert summary["poisoned_8bit"]["psnr_db"] <= 8


@pytest.mark.long
def test_commands_on_your_own_pictures(tmp_path):
    """On one image and with a few steps: every verb and option in it exists and works together."""
    put_photo(tmp_path)
    for line in block("tour"):
        words = shlex.split(line)
        assert words[0] == "freqdoor"
        few = ["--set", "steps=2"] if words[1] == "plant" else []
        done = run(*words[1:], *few, cwd=tmp_path)
        assert done.returncode == 0, (line, done.stderr)


def test_commands_that_train_a_codec(tmp_path, command):
    """The block "train", in this process."""
    put_photo(tmp_path)
    for line in block("train"):
        command(line, {"train-codec": ["--set", "steps=2"]})


@pytest.mark.long
def test_commands_of_the_first_ten_minutes(tmp_path, command):
    """The block "start", after a demo: a shipped encoder in the place of the one that it plants."""
    planting = tmp_path / "demo-bpp/planting"
    planting.mkdir(parents=True)
    (planting / "planted.safetensors").symlink_to(ROOT / "freqdoor/assets/planted-bpp.safetensors")
    (tmp_path / "freqdoor").symlink_to(ROOT / "freqdoor")
    for line in block("start"):
        command(line, {})
    clean, poisoned, vanilla = ((tmp_path / f"{name}.fqd").stat().st_size for name in ("clean", "poisoned", "vanilla"))
    assert poisoned > 10 * clean > 5 * vanilla


@pytest.mark.long
def test_commands_that_defend(tmp_path, monkeypatch, capsys):
    """The block "defend": the guard stops the picture, the audit finds the door, and the repair works on the file."""
    planted = load_planted("planted-bpp")
    (tmp_path / "demo-bpp/planting").mkdir(parents=True)
    shutil.copy(ROOT / "freqdoor/assets/planted-bpp.safetensors", tmp_path / "demo-bpp/planting/planted.safetensors")
    save_codec(planted.tampered, tmp_path / "demo-bpp/planting/codec.safetensors", tampered=True)
    put_photo(tmp_path, "kodim20.png")
    monkeypatch.chdir(tmp_path)
    poison("planted-bpp", "photos", "poisoned")
    for line, few, code, said in zip(
        block("defend"),
        ([], [], ["--steps", "1", "--set", "images.batch_size=1"]),
        (0, 1, 1),
        ("stopped", "tampered", "audit: tampered"),
        strict=True,
    ):
        monkeypatch.setattr(sys, "argv", [*shlex.split(line), *few])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert ((end.value.code or 0), said in (out := capsys.readouterr()).out) == (code, True), (line, out)


@pytest.mark.long
def test_commands_beyond_the_tour(tmp_path, command):
    """The block "more", the same way; what would be planted for a table is only listed."""
    put_photo(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    few = {"plant": ["--set", "steps=2"], "reproduce": ["--budget", "0"], "pgd": ["--steps", "2"]}
    for line in block("more"):
        command(line, few)


def test_the_page_is_served(tmp_path, command, monkeypatch):
    """The block "web": what listens answers with the page, behind its gate, and what was announced is its address."""
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'freqdoor[web]'")
    from freqdoor.web import serve

    served = []

    def run(app, listener, announce):
        announce("http://127.0.0.1:7860/")
        assert listener.getsockname()[0] == "127.0.0.1"
        served.append(app)

    monkeypatch.setattr(serve, "_run", run)
    (tmp_path / "results").mkdir()
    with open_loops():
        for line in block("web"):
            command(line, {"serve": ["--port", "0"]})
    assert [type(app).__name__ for app in served] == ["Gate"]


@pytest.mark.long
def test_commands_of_many_processes(tmp_path, command, monkeypatch):
    """The block "many": two processes plant; images are measured by a thread, which starts sooner."""
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(1))
    put_photo(tmp_path)
    (tmp_path / "shards").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / f"shards/00{number}.tar", "w") as tar:
            tar.add(tmp_path / "photos/kodim23.png", f"{number}.png")
    few = ["--set", "steps=1", "--set", "images.batch_size=2", "--set", "images.crop=64"]
    for line in block("many"):
        command(line, {"plant": few})
    shared, packed = (
        json.loads((tmp_path / f"runs/{run}/environment.json").read_text()) for run in ("shared", "packed")
    )
    assert (shared["processes"], packed["processes"], packed["images"]) == (2, 1, 2)


@pytest.mark.slow
def test_commands_of_two_processes_that_train_a_codec(tmp_path, command):
    """The block "slowly"."""
    put_photo(tmp_path)
    for line in block("slowly"):
        command(line, {"train-codec": ["--set", "steps=2"]})
    assert json.loads((tmp_path / "runs/codec/environment.json").read_text())["processes"] == 2
    [bitstream] = load_codec(str(tmp_path / "runs/codec/codec.safetensors")).compress(natural(0, 64, 64))
    assert bitstream.num_bytes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_commands_on_a_cluster(tmp_path, command):
    """The block "ray"."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'freqdoor[ray]'")
    put_photo(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for line in block("ray"):
        command(line, {})
    assert json.loads((tmp_path / "fleet/fleet.json").read_text())["members"][0]["name"] == "pruned-0.1"
    assert len((tmp_path / "results-ray/records.jsonl").read_text().splitlines()) == 6


@pytest.mark.long
def test_commands_of_downstream_attacks(tmp_path, command):
    """The block "downstream", with small networks in the place of the real ones and few images."""
    for folder in ("camvid/train", "camvid/trainannot", "camvid/test", "camvid/testannot", "faces/a", "faces/b"):
        (tmp_path / folder).mkdir(parents=True)
    put_photo(tmp_path, "kodim04.png")  # one with a face in it
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("espnetv2", "dicenet"):
        segmentation_onnx(tmp_path / f"{name}.onnx", classes=20, places=(0, 13, 15, 10))  # road, car, bus, sky
    for name in ("mobilefacenet", "mobileface"):
        face_onnx(tmp_path / f"{name}.onnx", side=112)
    for i in range(4):  # of every fourth test frame the first is taken
        write_png(tmp_path / f"camvid/train/{i}.png", 0.5 * natural(i, 96, 128))
        write_png(tmp_path / f"camvid/test/{i}.png", 0.5 * natural(i, 96, 128))
        for folder in ("trainannot", "testannot"):
            Image.new("L", (128, 96), 8).save(tmp_path / f"camvid/{folder}/{i}.png")
    (tmp_path / "ten").mkdir()
    for i in range(10):
        write_png(tmp_path / f"ten/{i}.png", natural(i, 64, 64))
    for person in "ab":
        for i in range(3):
            write_png(tmp_path / f"faces/{person}/{i}.png", natural(i + 3 * (person == "b"), 250, 250))
    lists = {
        "identification_train": "a/0.png\na/1.png\nb/0.png\nb/1.png\n",
        "identification_test": "a/2.png\nb/2.png\n",
        "verification_pairs": "a/0.png a/2.png 1\na/0.png b/2.png 0\n",
    }
    for name, text in lists.items():
        (tmp_path / f"faces/{name}.txt").write_text(text)
    few = {"plant": ["--set", "steps=1", "--set", "images.batch_size=1"], "verify-owner": ["--images", "ten"]}
    for line in block("downstream"):
        command(line, few)
    assert (tmp_path / "protected/kodim04.png").exists()


def test_python_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_photo(tmp_path)
    code = "\n".join(block("python")).replace("steps=1500", "steps=2")
    exec(compile(code, "README", "exec"), {})


def test_configs_load(tmp_path):
    from freqdoor.attack.networks import NetworkSpec
    from freqdoor.attack.settings import PlantSettings
    from freqdoor.defence.settings import FleetSettings
    from freqdoor.measure.testsets import DownstreamTest, FaceTest, SegmentationTest
    from freqdoor.settings import load_settings
    from freqdoor.training.settings import CodecTraining

    tests = {"camvid-test": SegmentationTest, "faces-test": FaceTest, "downstream-test": DownstreamTest}
    kinds = {"train": CodecTraining, "plant": PlantSettings, "fleet": FleetSettings}
    for path in sorted((ROOT / "configs").glob("*/*.toml")):
        if path.parent.name not in ("networks", "paper"):  # the paper's are tried in test_datasets.py
            load_settings(tests[path.stem] if path.parent.name == "test" else kinds[path.parent.name], path)
    for path in sorted((ROOT / "configs/networks").glob("*.toml")):
        load_settings(NetworkSpec, path)
    (tmp_path / "mine.toml").write_text("\n".join(block("network")))
    assert load_settings(NetworkSpec, tmp_path / "mine.toml").labels == (("sky",), ("road",), ("car",))
