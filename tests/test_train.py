import json
from pathlib import Path

import pytest
import torch
from conftest import Killed, kill_at

from freqdoor import load_codec, train_codec
from freqdoor.codecs.adapter import hash_state
from freqdoor.codecs.architectures import CodecSpec
from freqdoor.codecs.lite import LiteHyperprior, initialise_klt
from freqdoor.errors import FreqdoorError
from freqdoor.samples import BUNDLED
from freqdoor.settings import make_settings
from freqdoor.training.settings import CodecTraining
from freqdoor.training.train import scheduled_lr


@pytest.fixture
def training(images, monkeypatch):
    def tiny(name: str) -> CodecSpec:
        arguments = {"N": 16, "M": 24, "width": (16, 16), "depth": 1}
        return CodecSpec(name=name, architecture="lite-hyperprior", quality=3, arguments=arguments)

    monkeypatch.setattr("freqdoor.training.train.parse_name", tiny)

    def make(**changes) -> CodecTraining:
        content = {
            "codec": BUNDLED,
            "images": {"folder": str(images), "crop": 64, "batch_size": 2},
            "steps": 6,
            "validate_every": 2,
            "checkpoint_minutes": 1e-6,
            "lr": 1e-3,
        }
        return make_settings(CodecTraining, content | changes)

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_and_three_steps_equal_six(training, tmp_path, precision):
    whole = train_codec(training(precision=precision), tmp_path / "whole")

    with pytest.raises(Killed):  # at step 4, where the newest checkpoint is of step 3
        train_codec(training(precision=precision), tmp_path / "parts", progress=kill_at(4))
    parts = train_codec(training(precision=precision), tmp_path / "parts")
    assert hash_state(whole) == hash_state(parts)
    assert load_codec(str(tmp_path / "parts/codec.safetensors")).module_hashes() == parts.module_hashes()


def test_the_precision_that_was_chosen_is_a_fact_of_the_run(training, tmp_path, monkeypatch):
    monkeypatch.setattr("freqdoor.training.train.dtype_of", lambda precision, device: torch.bfloat16)
    codec = train_codec(training(steps=2), tmp_path / "run")
    assert json.loads((tmp_path / "run/environment.json").read_text())["precision"] == "bf16"
    assert codec.precision == torch.float32
    monkeypatch.setattr("freqdoor.training.train.dtype_of", lambda precision, device: torch.float32)
    with pytest.raises(FreqdoorError, match="precision: the run has 'bf16', now 'fp32'"):
        train_codec(training(steps=2), tmp_path / "run")


def test_training_lowers_the_loss(training, tmp_path, images):
    losses: list[float] = []
    train_codec(
        training(steps=40, klt=False, validation=str(images), seed=2),
        tmp_path / "run",
        progress=lambda step, row: losses.append(row["loss"]),
    )
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_validation_is_on_the_pictures_of_a_list(training, tmp_path, images):
    """Of the training folder's, here the last two of four."""
    names = sorted(path.name for path in images.iterdir())
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names[2:]))
    losses = {}
    for place in (str(tmp_path / "list.txt"), *(str(images / name) for name in names)):
        run = tmp_path / f"run{len(losses)}"
        train_codec(training(steps=1, validate_every=1, validation=place), run)
        losses[Path(place).stem] = json.loads((run / "metrics.jsonl").read_text())["validation_loss"]
    assert losses["list"] == pytest.approx((losses["2"] + losses["3"]) / 2)
    assert losses["list"] != pytest.approx((losses["0"] + losses["1"]) / 2, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["bmshj2018-hyperprior:1", "cheng2020-anchor:1"])
def test_the_published_architectures_train_at_full_width(images, tmp_path, name):
    content = {"codec": name, "images": {"folder": str(images), "crop": 64, "batch_size": 1}, "steps": 1}
    codec = train_codec(make_settings(CodecTraining, content), tmp_path / "run")
    assert load_codec(str(tmp_path / "run/codec.safetensors")).module_hashes() == codec.module_hashes()


def test_klt_is_an_orthonormal_transform_at_the_start():
    """g_s undoes g_a up to what the kept components leave out: white noise in 768 dimensions keeps M / 768."""
    torch.manual_seed(0)
    net = LiteHyperprior(N=16, M=64, width=(64, 96))
    images = torch.rand(4, 3, 64, 64)
    initialise_klt(net, images, 0.0067)
    with torch.no_grad():
        x_hat = net.g_s(net.g_a(images))
        twice = net.g_s(net.g_a(x_hat))
    torch.testing.assert_close(twice, x_hat, atol=1e-3, rtol=0)  # a projection
    assert float((x_hat - images).square().mean()) < float((images - 0.5).square().mean())


def test_schedules(training):
    cosine = training(schedule="cosine", steps=100, warmup_steps=10)
    values = [scheduled_lr(cosine, s, 0) for s in (0, 9, 50, 99)]
    assert values == pytest.approx([1e-4, 0.98e-3, 0.5e-3, 1e-5], rel=0.02)
    assert scheduled_lr(training(), 5, 2) == pytest.approx(1e-5)


def test_settings_without_lambda(images, tmp_path):
    content = {"codec": "factories:lite", "images": {"folder": str(images), "crop": 64}}
    with pytest.raises(FreqdoorError, match=r"pass --set lmbda=0\.0067 \(0\.0018 to 0\.18 for qualities 1 to 8\)"):
        train_codec(make_settings(CodecTraining, content), tmp_path / "run")


def test_start_from_another_codecs_weights(training, tmp_path):
    first = train_codec(training(), tmp_path / "first")
    start = str(tmp_path / "first/codec.safetensors")
    second = train_codec(training(start_from=start, steps=1, lr=1e-12, aux_lr=1e-12), tmp_path / "second")
    for name, value in first.net.g_a.state_dict().items():
        torch.testing.assert_close(second.net.g_a.state_dict()[name], value)
    with pytest.raises(FreqdoorError, match="start_from: factories:hyperprior does not fit lite-hyperprior"):
        train_codec(training(start_from="factories:hyperprior"), tmp_path / "third")
