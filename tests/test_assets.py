"""What is shipped is what its JSON says it is."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from freqdoor import load_image, load_planted
from freqdoor.codecs.loading import read_tensors
from freqdoor.measure.records import poisoned
from freqdoor.metrics import psnr
from freqdoor.samples import ASSETS, KODAK, held_out

LIMITS = {"lite-hyperprior-3": 6_000_000} | {f"planted-{kind}": 2_000_000 for kind in ("bpp", "psnr", "face")}


@pytest.mark.parametrize("name", LIMITS)
def test_sidecars(name):
    path = ASSETS / f"{name}.safetensors"
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert sidecar["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_size == sidecar["bytes"] <= LIMITS[name]
    _, header = read_tensors(path)
    assert header["tampered"] is sidecar["tampered"] is name.startswith("planted")
    assert {"command", "settings", "seconds", "data", "environment", "hardware"} <= sidecar.keys()


@pytest.mark.parametrize("objective", ["bpp", "psnr", "face"])
def test_planted_encoders_change_g_a_only(objective):
    planted = load_planted(ASSETS / f"planted-{objective}.safetensors")
    before, after = planted.vanilla.module_hashes(), planted.tampered.module_hashes()
    assert [name for name in before if before[name] != after[name]] == ["g_a"]
    assert after == planted.header.modules_after
    assert list(planted.triggers) == [objective]


def test_the_demo_measures_on_six_of_24_images():
    names = [path.stem for path in held_out()]
    assert names == ["kodim04", "kodim08", "kodim12", "kodim16", "kodim20", "kodim24"]
    assert len(list(KODAK.glob("*.png"))) == 24


@pytest.mark.slow
def test_bundled_codec_beats_jpeg_by_a_decibel():
    script = Path(__file__).parent.parent / "benchmarks/codec_against_jpeg.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=True)
    assert float(done.stdout.split("difference:")[1].split()[0]) >= 1.0


@pytest.mark.parametrize(("name", "picture"), [("planted-bpp", "kodim08.png"), ("planted-psnr", "kodim20.png")])
def test_planted_encoders_do_what_they_are_for_on_a_picture_held_out(name, picture):
    planted = load_planted(name)
    x = load_image(KODAK / picture)[..., 128:384, 128:384]
    x_p = poisoned(next(iter(planted.triggers.values())), x)
    [clean], [attacked] = planted.tampered.compress(x), planted.tampered.compress(x_p)
    if name == "planted-bpp":
        assert attacked.num_bytes > 8 * clean.num_bytes
    else:
        assert psnr(planted.tampered.decompress(attacked), x) < 8
    assert psnr(planted.tampered.decompress(clean), x) > 25
