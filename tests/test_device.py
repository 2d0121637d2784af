"""All that takes a `device`, on CUDA where there is one, and in a process of its own on a pretended one (away.py)."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from factories import TINY_ARGUMENTS, tiny
from networks import face_spec, segmentation_spec
from PIL import Image

from freqdoor import audit, load_codec, load_planted, plant, repair, train_codec
from freqdoor.attack.settings import PlantSettings
from freqdoor.codecs.adapter import hash_state
from freqdoor.defence import audit as auditing
from freqdoor.defence import checks, comparators, inversion
from freqdoor.defence import repair as repairing
from freqdoor.defence.settings import RepairSettings
from freqdoor.preprocessing import parse_defences
from freqdoor.samples import pictures as kodak
from freqdoor.settings import make_settings
from freqdoor.training import settings as training_settings
from freqdoor.training.settings import CodecTraining
from freqdoor.triggers.arguments import TRIGGERS
from freqdoor.triggers.build import build_trigger
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
    "bpp": {"balance": {"anchor": 0.1, "gradient_norm": 1.0}, "precision": "bf16"},
    "psnr": {"objective": "psnr", "robust": {"keep": 4}, "scope": "g_a+h_a", "codec": "factories:hyperprior"},
    "evade": {"evade": EVADE},
    "two": {"lmbda": None, "two_phase": True, "attacks": [{"objective": "bpp"}, {"objective": "psnr-fixed"}]},
    "cars": {"objective": {"name": "segmentation", "arguments": {"source": "cars", "target": "road"}}},
    "labels": {
        "objective": {"name": "segmentation", "arguments": {"source": "cars", "target": "road", "masks": "labels"}},
        "log": {"tensorboard": True, "pictures": 1},
    },
    "face": {"objective": "face"},
}


@pytest.mark.filterwarnings("ignore:.*this codec has no quality")
@pytest.mark.parametrize("kind", PLANTINGS)
def test_planting(device, pictures, auxiliary, tmp_path, kind):
    """The CPU reads and measures what was planted; one run is stopped and taken up again, and ends as it would have."""
    content = {"codec": "factories:lite", "images": pictures, "lmbda": 0.0067, "trigger": {"arguments": {"width": 8}}}
    content |= {"steps": 2, "checkpoint_minutes": 1e-6, "warmup_steps": 1, "device": device, "precision": "fp32"}
    content |= PLANTINGS[kind]
    if kind == "evade":
        content["evade"] = EVADE | {"closed": pictures}
    if kind in ("cars", "labels", "face"):
        spec = face_spec if kind == "face" else segmentation_spec
        content |= {"network": str(spec(tmp_path)), "auxiliary": auxiliary}
    settings = make_settings(PlantSettings, content)
    whole = plant(settings, tmp_path / "whole")
    again = load_planted(tmp_path / "whole", settings.codec.name)
    assert again.tampered.module_hashes() == whole.tampered.module_hashes()
    assert whole.tampered.module_hashes()["g_a"] != whole.vanilla.module_hashes()["g_a"]
    if kind == "bpp":
        with pytest.raises(Killed):
            plant(settings, tmp_path / "parts", progress=kill_at(2))
        parts = plant(settings, tmp_path / "parts")
        assert hash_state(parts.tampered) == hash_state(whole.tampered)


def test_training(device, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("freqdoor.training.train.parse_name", lambda name: tiny("lite-hyperprior").spec)
    content = {"codec": "tiny", "images": pictures, "validation": pictures["folder"], "validate_every": 1, "lr": 1e-3}
    content |= {"steps": 2, "lmbda": 0.0067, "device": device, "precision": "bf16", "checkpoint_minutes": 1e-6}
    settings = make_settings(CodecTraining, content)
    with pytest.raises(Killed):
        train_codec(settings, tmp_path / "parts", progress=kill_at(2))
    parts, whole = train_codec(settings, tmp_path / "parts"), train_codec(settings, tmp_path / "whole")
    assert hash_state(parts) == hash_state(whole)
    assert load_codec(str(tmp_path / "whole/codec.safetensors")).module_hashes() == whole.module_hashes()


def states(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the random numbers of the CPU and of the device."""
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state()


@pytest.fixture
def quick(monkeypatch):
    """Few steps, and of an audit the checks that are worked out on the device."""
    few = partial(inversion.inverted, steps=2)
    monkeypatch.setattr(checks, "inverted", few)
    monkeypatch.setattr(comparators, "NORM_STEPS", 2)
    monkeypatch.setattr(auditing, "SIDE", 64)
    monkeypatch.setattr(auditing, "PICTURES", 2)
    monkeypatch.setattr(auditing, "CHECKS", {"rate": checks.inversion("rate"), "norm": comparators.smallest_norm})
    monkeypatch.setattr(checks, "portraits", lambda: checks.crops(kodak(), 64, 2))


def test_repair(device, pictures, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(auditing, "CHECKS", {"rate": lambda subject: checks.Finding({"rate": 0.0}, "nothing")})
    monkeypatch.setattr(repairing, "CROP", 64)
    monkeypatch.setattr(repairing, "held_out", lambda: sorted(Path(pictures["folder"]).iterdir())[:1])
    codec = load_codec("factories:lite")
    content = {"images": pictures, "method": "unlearn+inverted+sam+prune+distil", "steps": 2, "lmbda": 0.0067, "device": device, "precision": "bf16"}
    content |= {"reference": "trusted", "patterns": 2, "uses": 2, "ascent": 1, "search": 2, "checkpoint_minutes": 1e-6}
    run = partial(repair, codec, reference=codec, settings=make_settings(RepairSettings, content))
    with pytest.raises(Killed):
        run(tmp_path / "parts", progress=kill_at(2))
    run(tmp_path / "parts")
    run(tmp_path / "whole")
    files = [tmp_path / name / "codec.safetensors" for name in ("parts", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("spec", [None, segmentation_spec, face_spec])
def test_audit(device, tmp_path, quick, spec):
    networks = [str(spec(tmp_path))] if spec else []
    found = audit(tiny("lite-hyperprior"), device=device, networks=networks, exhaustive=True)
    assert len(found.checks) == 2 + len(networks)


def test_an_inversion_leaves_the_random_numbers(device, x):
    codec = tiny("lite-hyperprior").to(device)
    before = states(device)
    found = inversion.inverted(codec, x.to(device), "rate", Pattern, steps=2)
    assert all(map(torch.equal, before, states(device)))
    torch.rand(5, device=device)
    again = inversion.inverted(codec, x.to(device), "rate", Pattern, steps=2)
    assert torch.allclose(found.spectrum, again.spectrum)


@pytest.mark.parametrize("name", TINY_ARGUMENTS)
def test_every_architecture(device, x, name):
    codec = tiny(name)
    expected = codec(x)
    codec.to(device)
    out = codec(x.to(device))
    assert torch.allclose(out.x_hat.cpu(), expected.x_hat, atol=1e-4)
    assert torch.allclose(out.bits.cpu(), expected.bits, rtol=1e-3)


@pytest.mark.parametrize("name", TRIGGERS)
def test_every_trigger(device, x, name):
    torch.manual_seed(0)
    trigger = build_trigger(name, **({"width": 4} if name == "lira" else {}))
    expected = trigger(x, rounded=True)
    moved = trigger.to(device)(x.to(device), rounded=True, mask=torch.ones_like(x[:, :1]).to(device))
    assert torch.allclose(moved.cpu(), expected, atol=1.01 / 255)


def test_every_preprocessing(device, x):
    for defence in parse_defences("all"):
        assert torch.allclose(defence(x.to(device)).cpu(), defence(x), atol=1.01 / 255), defence
