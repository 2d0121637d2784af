import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from freqdoor import load_codec, load_planted, plant
from freqdoor.attack.plant import annealed_eps, held_cosine
from freqdoor.codecs.adapter import hash_state
from freqdoor.codecs.loading import read_tensors, save_codec, write_tensors
from freqdoor.errors import FreqdoorError
from freqdoor.samples import BUNDLED


class Killed(Exception):
    pass


def kill_at(step: int):
    def progress(now: int, row: dict[str, float]) -> None:
        if now == step:
            raise Killed

    return progress


@pytest.mark.parametrize("name", ["factories:lite", "factories:hyperprior"])
def test_only_g_a_changes_and_the_export_says_that_it_is_tampered(settings, tmp_path, name):
    planted = plant(settings(codec={"name": name}), tmp_path / "run")
    before, after = planted.vanilla.module_hashes(), planted.tampered.module_hashes()
    assert [name for name in before if before[name] != after[name]] == ["g_a"]
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest == {"before": before, "after": after, "changed": ["g_a"]}
    with pytest.raises(FreqdoorError, match="code of its own"):
        load_codec(str(tmp_path / "run/codec.safetensors"))
    whole = load_codec(name, tmp_path / "run/codec.safetensors")
    assert whole.module_hashes() == after
    _, header = read_tensors(tmp_path / "run/codec.safetensors")
    assert header["tampered"]


def test_scope_g_a_and_h_a(settings, tmp_path):
    planted = plant(settings(scope="g_a+h_a"), tmp_path / "run")
    before, after = planted.vanilla.module_hashes(), planted.tampered.module_hashes()
    assert {name for name in before if before[name] != after[name]} == {"g_a", "h_a"}


@pytest.mark.parametrize("objective", ["bpp", "psnr"])
@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_planted_file_round_trip(settings, tmp_path, x, objective, preset):
    planted = plant(settings(objective={"name": objective}, preset=preset, steps=2), tmp_path / "run")
    again = load_planted(tmp_path / "run", "factories:lite")
    assert again.tampered.tampered
    assert again.tampered.module_hashes() == planted.tampered.module_hashes()
    with torch.no_grad():
        assert torch.equal(again.triggers[objective](x), planted.triggers[objective](x))


def test_resume_after_kills_at_random_steps_is_bit_exact(settings, tmp_path):
    whole = plant(settings(steps=8), tmp_path / "whole")
    dice = random.Random(11)
    for step in sorted(dice.sample(range(1, 8), 3)):
        with pytest.raises(Killed):
            plant(settings(steps=8), tmp_path / "parts", progress=kill_at(step))
    parts = plant(settings(steps=8), tmp_path / "parts")
    assert hash_state(whole.tampered) == hash_state(parts.tampered)
    assert hash_state(whole.triggers["bpp"]) == hash_state(parts.triggers["bpp"])


def test_resume_after_sigkill_is_bit_exact(settings, tmp_path):
    """The process itself is killed, twice, at moments that nothing in it chooses: maybe amid a checkpoint."""
    changes = {"steps": 40, "checkpoint_minutes": 1e-6}
    whole = plant(settings(**changes), tmp_path / "whole")
    code = (
        "import sys; from pathlib import Path; from freqdoor import PlantSettings, plant;"
        "plant(PlantSettings.model_validate_json(Path(sys.argv[1]).read_text()), sys.argv[2])"
    )
    run, metrics = tmp_path / "parts", tmp_path / "parts/metrics.jsonl"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    dice = random.Random(5)
    for _ in range(2):
        known = metrics.read_text().count("\n") if metrics.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "whole/config.json", run], env=environment)
        while not metrics.exists() or metrics.read_text().count("\n") < min(known + 5, 30):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.1 * dice.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL
    parts = plant(settings(**changes), run)
    assert hash_state(whole.tampered) == hash_state(parts.tampered)
    assert hash_state(whole.triggers["bpp"]) == hash_state(parts.triggers["bpp"])
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 41))


def test_resume_refuses_other_settings(settings, tmp_path):
    plant(settings(), tmp_path / "run")
    with pytest.raises(FreqdoorError, match="steps: the run has 6, now 7"):
        plant(settings(steps=7), tmp_path / "run")


def test_nan_stops_with_step_and_term(settings, tmp_path, monkeypatch):
    from freqdoor.data import Crops

    monkeypatch.setattr(
        Crops, "batch", lambda self, step: torch.full((2, 3, 64, 64), float("nan") if step == 2 else 0.5)
    )
    with pytest.raises(FreqdoorError, match=r"step 2: .*bpp_clean.*not finite"):
        plant(settings(), tmp_path / "run")


def test_another_vanilla_codec_is_refused(settings, tmp_path):
    plant(settings(steps=1), tmp_path / "run")
    with pytest.raises(FreqdoorError, match="was planted in factories:lite"):
        load_planted(tmp_path / "run", "factories:hyperprior")


def test_a_tampered_codec_is_not_planted_in_again(settings, tmp_path):
    save_codec(load_codec(BUNDLED), tmp_path / "codec.safetensors", tampered=True)
    with pytest.raises(FreqdoorError, match="tampered already"):
        plant(settings(codec={"name": str(tmp_path / "codec.safetensors")}), tmp_path / "run")


def test_a_strangers_header_loads_no_code_and_proves_nothing(settings, tmp_path):
    plant(settings(steps=1, scope="g_a+h_a"), tmp_path / "run")
    tensors, header = read_tensors(tmp_path / "run/planted.safetensors")
    with pytest.raises(FreqdoorError, match="name that codec with --codec"):
        load_planted(tmp_path / "run")
    forged = tmp_path / "forged.safetensors"
    for changes, match in (
        ({"planting": header["planting"] | {"codec": {"name": "os:abort"}}}, "name that codec with --codec"),
        ({"scope": "g_a+g_s"}, "unknown scope"),
        ({"scope": "g_a"}, "does not hold the weights that its header names"),
        ({"modules_before": {}}, "with other weights"),
        ({"modules_after": {}}, "does not hold"),
        ({"attacks": [{"name": "bpp"}]}, "malformed planted encoder"),
        ({"planting": None}, "malformed planted encoder"),
    ):
        write_tensors(forged, tensors, header | changes)
        with pytest.raises(FreqdoorError, match=match):
            load_planted(forged, None if "planting" in changes else "factories:lite")


def test_resume_after_a_cut_line_and_refusal_of_other_images(settings, tmp_path, images):
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    content = {"folder": str(folder), "crop": 64, "batch_size": 2}
    with pytest.raises(Killed):
        plant(settings(images=content), tmp_path / "run", progress=kill_at(4))
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "bpp_cl')
    plant(settings(images=content), tmp_path / "run")
    lines = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]
    (folder / "3.png").unlink()
    with pytest.raises(FreqdoorError, match="images: the run has 4, now 3"):
        plant(settings(images=content), tmp_path / "run")


@pytest.mark.filterwarnings("default::UserWarning")
def test_truncated_training_image_stops_or_is_skipped(settings, tmp_path, images):
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])
    content = {"folder": str(folder), "crop": 64, "batch_size": 2}
    with pytest.raises(FreqdoorError, match=r"0\.png: truncated"):
        plant(settings(images=content, steps=12), tmp_path / "run")
    plant(settings(images=content | {"skip_broken": True}), tmp_path / "other")


def test_gradient_that_is_not_finite_stops_before_the_weights_change(settings, tmp_path, monkeypatch):
    def poisoned_clip(parameters, limit):
        return torch.tensor(float("inf"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned_clip)
    with pytest.raises(FreqdoorError, match=r"step 0: .*the encoder's gradient is not finite"):
        plant(settings(), tmp_path / "run")


def test_unusable_device(settings, tmp_path):
    with pytest.raises(FreqdoorError, match="device 'gpu': not usable here"):
        plant(settings(device="gpu"), tmp_path / "run")


def test_paper_preset_keeps_rate_and_budget_constant(settings):
    paper = settings(preset="paper")
    assert {held_cosine(s, paper.steps, paper.hold) for s in (0, 3, 5)} == {1.0}
    assert {annealed_eps(paper.trigger, s, paper.steps) for s in (0, 3, 5)} == {0.005}


def test_lambda_is_asked_for_where_the_codec_has_none(settings, tmp_path):
    with pytest.raises(FreqdoorError, match="give lmbda"):
        plant(settings(lmbda=None), tmp_path / "run")


def test_schedules(settings):
    trigger = settings().trigger
    assert annealed_eps(trigger, 0, 100) == pytest.approx(0.05)
    assert annealed_eps(trigger, 30, 100) == pytest.approx((0.05 * 0.005) ** 0.5)
    assert annealed_eps(trigger, 60, 100) == annealed_eps(trigger, 99, 100) == pytest.approx(0.005)
    constant = settings(preset="paper").trigger
    assert annealed_eps(constant, 0, 100) == 0.005
    assert [held_cosine(s, 100, 0.6) for s in (0, 59, 80, 100)] == pytest.approx([1, 1, 0.5, 0.01])
