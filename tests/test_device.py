"""All that takes a `device`, on CUDA where there is one, and in a process of its own on a pretended one (away.py)."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import contents, natural
from factories import tiny
from networks import face_spec, segmentation_spec
from PIL import Image

from freqdoor import load_codec, load_planted, plant, repair, train_codec
from freqdoor.attack.settings import PlantSettings
from freqdoor.codecs.adapter import hash_state
from freqdoor.defence import checks, comparators, unlearning
from freqdoor.defence import repair as repairing
from freqdoor.defence.checks import Subject
from freqdoor.defence.settings import RepairSettings
from freqdoor.measure.records import measured_image
from freqdoor.settings import make_settings
from freqdoor.training import settings as training_settings
from freqdoor.training.settings import CodecTraining
from freqdoor.triggers.pattern import Pattern

PRETENDED = os.environ.get("FREQDOOR_PRETEND") == "1"
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")


class Killed(Exception):
    pass


def kill_at(step: int):
    def progress(now: int, row: dict[str, float]) -> None:
        if now == step:
            raise Killed

    return progress


@pytest.fixture(scope="session")
def pretended():
    import away

    away.register()
    return away.NAME


@pytest.fixture
def device(request, monkeypatch):
    if PRETENDED:
        monkeypatch.setattr(training_settings, "DEVICES", ("cpu", request.getfixturevalue("pretended")))
        return request.getfixturevalue("pretended")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return "cuda"


@pytest.fixture
def pictures(images):
    return {"folder": str(images), "crop": 64, "batch_size": 2}


@pytest.fixture
def auxiliary(tmp_path, pictures):
    labels = tmp_path / "labels"
    labels.mkdir()
    for path in Path(pictures["folder"]).iterdir():
        Image.linear_gradient("L").resize((128, 96)).point(lambda value: value // 86).save(labels / path.name)
    return pictures | {"labels": str(labels)}


@pytest.mark.skipif(PRETENDED, reason="is the other process")
def test_a_pretended_device_finds_what_would_fail_on_a_gpu():
    environment = os.environ | {"FREQDOOR_PRETEND": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-x", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout and "skipped" in done.stdout


EVADE = {
    "goals": ["rate", "distortion"], "blocks": [8, 16], "own_steps": 1, "others": True, "strengths": [0.5],
    "universal_weight": 1.0, "rate_cap": 4.0, "restart": 2,
}  # fmt: skip
PLANTINGS = {
    "bpp": {"balance": {"anchor": 0.1, "gradient_norm": 1.0}},
    "psnr": {"objective": "psnr", "robust": {"keep": 4}, "scope": "g_a+h_a", "codec": "factories:hyperprior"},
    "evade": {"evade": EVADE},
    "paper": {"preset": "paper", "lmbda": None, "two_phase": True, "attacks": [{"objective": "bpp"}, {"objective": "psnr-fixed"}]},
    "lira": {"trigger": {"name": "lira"}},
    "ftrojan": {"trigger": {"name": "ftrojan"}},
}


@pytest.mark.parametrize("kind", PLANTINGS)
def test_planting(device, pictures, tmp_path, kind):
    """Stopped and taken up again it ends as it would have; the CPU reads and measures what was planted."""
    content = {"codec": "factories:lite", "images": pictures, "lmbda": 0.0067, "trigger": {"arguments": {"width": 8}}}
    content |= {"steps": 3, "checkpoint_minutes": 1e-6, "warmup_steps": 1, "device": device, "precision": "bf16"}
    content |= PLANTINGS[kind]
    if kind == "evade":
        content["evade"] = EVADE | {"closed": pictures}
    settings = make_settings(PlantSettings, content)
    with pytest.raises(Killed):
        plant(settings, tmp_path / "parts", progress=kill_at(2))
    parts = plant(settings, tmp_path / "parts")
    whole = plant(settings, tmp_path / "whole")
    assert hash_state(parts.tampered) == hash_state(whole.tampered)
