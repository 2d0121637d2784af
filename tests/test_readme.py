"""README's commands run, and its quick demo shows what it says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "freqdoor", *arguments], capture_output=True, text=True, cwd=cwd, timeout=900
    )


def block(marker: str) -> list[str]:
    """The lines of the code block behind an HTML comment."""
    found = re.search(rf"<!-- {marker} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert found, marker
    return [line for line in found.group(1).splitlines() if line and not line.startswith("#")]


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


def test_commands_of_the_tour(tmp_path):
    """The block "tour", on one image and with a few steps: every verb and option in it exists and works together."""
    (tmp_path / "photos").mkdir()
    kodak = ROOT / "freqdoor/assets/kodak/kodim23.png"
    (tmp_path / "photos/kodim23.png").symlink_to(kodak)
    for line in block("tour"):
        words = shlex.split(line)
        assert words[0] == "freqdoor"
        few = ["--set", "steps=2"] if words[1] in ("plant", "train-codec") else []
        done = run(*words[1:], *few, cwd=tmp_path)
        assert done.returncode == 0, (line, done.stderr)


def test_commands_beyond_the_tour(tmp_path):
    """The block "more", the same way; what would be planted for a table is only listed."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/kodim23.png").symlink_to(ROOT / "freqdoor/assets/kodak/kodim23.png")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for line in block("more"):
        words = shlex.split(line)
        assert words[0] == "freqdoor"
        few = {"plant": ["--set", "steps=2"], "reproduce": ["--budget", "0"], "pgd": ["--steps", "2"]}
        done = run(*words[1:], *few.get(words[1], []), cwd=tmp_path)
        assert done.returncode == 0, (line, done.stderr)


def test_python_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/kodim23.png").symlink_to(ROOT / "freqdoor/assets/kodak/kodim23.png")
    code = "\n".join(block("python")).replace("steps=1500", "steps=2")
    exec(compile(code, "README", "exec"), {})


def test_configs_load():
    import tomllib

    from freqdoor.config import CodecTraining, PlantSettings
    from freqdoor.settings import load_settings

    for path in sorted((ROOT / "configs").glob("*.toml")):
        kind = (
            CodecTraining
            if "lr" in (content := tomllib.loads(path.read_text())) and isinstance(content["codec"], str)
            else PlantSettings
        )
        load_settings(kind, path)
