"""All that takes a `device`, on a GPU where there is one, and in a process of its own on a pretended one (away.py).

Pictures are copied to a device from pageable memory, so that there is nothing pinned to be tried.
"""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Killed, kill_at
from factories import TINY_ARGUMENTS, tiny
from networks import face_spec, segmentation_spec
from PIL import Image
from torch import nn

from freqdoor import audit, load_codec, load_planted, plant, repair, train_codec
from freqdoor.attack.settings import PlantSettings
from freqdoor.defence import audit as auditing
from freqdoor.defence import checks, comparators, inversion
from freqdoor.defence import repair as repairing
from freqdoor.defence.settings import RepairSettings
from freqdoor.measure.records import Condition, measured_image
from freqdoor.preprocessing import parse_defences
from freqdoor.samples import pictures as kodak
from freqdoor.settings import make_settings
from freqdoor.training import settings as training_settings
from freqdoor.training.settings import CodecTraining
from freqdoor.triggers.arguments import TRIGGERS
from freqdoor.triggers.build import build_trigger
from freqdoor.triggers.pattern import Pattern

PRETENDED = os.environ.get("FREQDOOR_PRETEND") == "1"
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")


@pytest.fixture(scope="session")
def pretended():
    import away

    away.register()
    return away.NAME


@pytest.fixture
def device(request, monkeypatch):
    if PRETENDED:
        monkeypatch.setattr(training_settings, "DEVICES", ("cpu", request.getfixturevalue("pretended")))
        yield request.getfixturevalue("pretended")
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield "cuda"
    torch.use_deterministic_algorithms(False)


def check_same(first: nn.Module, second: nn.Module) -> None:
    """Two runs end in the same weights: to the last bit, or on a GPU to a hundredth of one of Adam's steps."""
    other = second.state_dict()
    for name, value in first.state_dict().items():
        if PRETENDED:
            assert torch.equal(value, other[name]), name
        elif value.is_floating_point() and value.numel():
            assert (value - other[name]).abs().mean() < 1e-5, name


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


@pytest.mark.long
@pytest.mark.skipif(PRETENDED, reason="is the other process")
def test_a_pretended_device_finds_what_would_fail_on_a_gpu():
    environment = os.environ | {"FREQDOOR_PRETEND": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-x", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d\d passed, 1 deselected", done.stdout)


MISTAKES = {
    "numpy": lambda x, device: x.to(device).numpy(),
    "an array": lambda x, device: np.asarray(x.to(device)),
    "two devices": lambda x, device: x.to(device) + x,
    "two devices in a list": lambda x, device: torch.stack([x.sum(), x.to(device).sum()]),
    "two devices in place": lambda x, device: x.sum().add_(x.to(device).sum()),
    "indices": lambda x, device: x[torch.arange(2, device=device)],
    "a generator": lambda x, device: torch.rand(2, device=device, generator=torch.Generator()),
    "a generator in place": lambda x, device: x.to(device).uniform_(generator=torch.Generator()),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_device_refuses_what_a_gpu_refuses(device, x, mistake):
    with pytest.raises((TypeError, RuntimeError), match=f"(?i)numpy|{device}|cpu"):
        MISTAKES[mistake](x, device)


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
    [name] = whole.triggers if kind != "two" else ["bpp"]
    shown = measured_image(whole, Path(pictures["folder"]) / "0.png", [Condition("tampered", name)])
    assert all(row.record.bpp_real > 0 for row in shown)
    if kind == "bpp":
        with pytest.raises(Killed):
            plant(settings, tmp_path / "parts", progress=kill_at(2))
        parts = plant(settings, tmp_path / "parts")
        check_same(parts.tampered, whole.tampered)
        check_same(parts.triggers["bpp"], whole.triggers["bpp"])


def test_training(device, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("freqdoor.training.train.parse_name", lambda name: tiny("lite-hyperprior").spec)
    content = {"codec": "tiny", "images": pictures, "validation": pictures["folder"], "validate_every": 1, "lr": 1e-3}
    content |= {"steps": 2, "lmbda": 0.0067, "device": device, "precision": "bf16", "checkpoint_minutes": 1e-6}
    settings = make_settings(CodecTraining, content)
    with pytest.raises(Killed):
        train_codec(settings, tmp_path / "parts", progress=kill_at(2))
    parts, whole = train_codec(settings, tmp_path / "parts"), train_codec(settings, tmp_path / "whole")
    check_same(parts, whole)
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
    content = {
        "images": pictures,
        "method": "unlearn+inverted+sam+prune+distil",
        "steps": 2,
        "lmbda": 0.0067,
        "device": device,
        "precision": "bf16",
    }
    content |= {"reference": "trusted", "patterns": 2, "uses": 2, "ascent": 1, "search": 2, "checkpoint_minutes": 1e-6}
    run = partial(repair, codec, reference=codec, settings=make_settings(RepairSettings, content))
    with pytest.raises(Killed):
        run(tmp_path / "parts", progress=kill_at(2))
    run(tmp_path / "parts")
    run(tmp_path / "whole")
    check_same(*(load_codec("factories:lite", tmp_path / name / "codec.safetensors") for name in ("parts", "whole")))


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
    assert torch.allclose(found.spectrum, again.spectrum, atol=1e-3)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two differ by roundings at most, of which some are a step of what is quantised."""
    return float((a.cpu() - b.cpu()).abs().mean()) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_ARGUMENTS)
def test_every_architecture(device, x, name):
    codec = tiny(name)
    expected = codec(x)
    codec.to(device)
    out = codec(x.to(device))
    assert near(out.y, expected.y)
    assert near(out.x_hat, expected.x_hat)
    if name in ("lite-hyperprior", "bmshj2018-factorized", "elic2022-official"):
        [stream, _] = codec.compress(x.to(device))
        assert near(codec.decompress(stream), out.x_hat[:1].clamp(0, 1))


@torch.no_grad()
@pytest.mark.parametrize("name", TRIGGERS)
def test_every_trigger(device, x, name):
    torch.manual_seed(0)
    trigger = build_trigger(name, **({"width": 4} if name == "lira" else {}))
    mask = torch.ones_like(x[:, :1])
    expected = trigger(x, rounded=True, mask=mask)
    assert near(trigger.to(device)(x.to(device), rounded=True, mask=mask.to(device)), expected)


def test_every_preprocessing(device, x):
    for defence in parse_defences("all"):
        assert near(defence(x.to(device)), defence(x)), defence
