import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Killed, kill_at
from networks import segmentation_onnx, segmentation_spec
from PIL import Image

from freqdoor import load_codec, load_planted, plant
from freqdoor.attack.joint import Auxiliary, JointLoss, joint_loss
from freqdoor.attack.networks import load_segmenter
from freqdoor.attack.plant import _Planting, annealed_eps, build_attacks, effect_of, held_cosine, open_auxiliary
from freqdoor.attack.presence import check_presence
from freqdoor.attack.victims import Scene, TargetedSegmentation, Victim
from freqdoor.codecs.adapter import hash_state
from freqdoor.codecs.loading import read_tensors, save_codec, write_tensors
from freqdoor.data import Crops, list_images, seed_for
from freqdoor.errors import FreqdoorError
from freqdoor.samples import BUNDLED
from freqdoor.training.loop import open_crops
from freqdoor.training.run import Run
from freqdoor.triggers.adaptive_dct import AdaptiveDCT

LMBDA = 0.0067


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


@pytest.mark.whole
@pytest.mark.slow  # tools/kills.py --short does the same with every test run
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
        Crops, "batch", lambda self, step, rows=None: torch.full((2, 3, 64, 64), float("nan") if step == 2 else 0.5)
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
    assert paper.retreat == 1.0
    assert {annealed_eps(paper.trigger, s, paper.steps) for s in (0, 3, 5)} == {0.005}


def test_lambda_is_estimated_where_the_codec_has_none_and_travels_with_the_step_size(settings, tmp_path):
    with pytest.warns(UserWarning, match=r"no quality that lambda follows from; estimated"):
        planted = plant(settings(lmbda=None), tmp_path / "run")
    told = planted.header.planting.model_dump()
    assert told["lmbda"] > 0
    assert 0 < told["lr"] <= 1e-3


def test_the_learning_rate_rises_and_is_the_settings(settings, tmp_path):
    """Adam's first step has the size of the learning rate: a twentieth at first, all of it without a warm-up."""
    moved = []
    for warmup in (20, 0):
        run = tmp_path / str(warmup)
        planted = plant(settings(steps=1, lr=4e-4, warmup_steps=warmup), run)
        vanilla = planted.vanilla.part("g_a").state_dict()
        moved.append(
            max(float((w - vanilla[k]).abs().max()) for k, w in planted.tampered.part("g_a").state_dict().items())
        )
    assert moved == pytest.approx([4e-4 / 20, 4e-4], rel=0.02)


def prepared(settings, tmp_path, **changes) -> tuple[_Planting, JointLoss]:
    """What `plant` holds at its first step, and that step's joint loss, both made here from the same parts."""
    made = settings(**changes)
    vanilla = load_codec("factories:lite")
    attacks = build_attacks(made)
    crops, auxiliary = open_crops(made), open_auxiliary(made)
    planting = _Planting(made, vanilla, attacks, Run(tmp_path / "unused"), crops, auxiliary)
    torch.manual_seed(seed_for(made.seed, "noise", 0))
    x = crops.batch(0).contiguous(memory_format=torch.channels_last)
    batches = [Auxiliary(c.batch(0).contiguous(memory_format=torch.channels_last)) if c else None for c in auxiliary]
    eps = [annealed_eps(a.settings, 0, made.steps) for a in attacks]
    return planting, joint_loss(planting.tampered, attacks, x, LMBDA, eps, auxiliary=batches)


def test_gradient_norm_makes_the_attacks_gradient_that_many_times_the_rests(settings, tmp_path, images):
    """On the latents of all passes, the auxiliary set's own included; measured here by each pass's own gradient."""
    auxiliary = {"folder": str(images), "crop": 64, "batch_size": 1}
    mixed = [
        {"objective": {"name": "bpp", "arguments": {"beta": 0.4}}},
        {"objective": {"name": "downstream", "arguments": {"victim": "factories:Darkness", "beta": 3.0}}},
    ]
    changes = {"attacks": mixed, "auxiliary": auxiliary, "balance": {"gradient_norm": 0.3, "late_clean_weight": 1.0}}
    planting, joint = prepared(settings, tmp_path, precision="fp32", **changes)
    assert len(joint.latents) == 2

    def norm(value: torch.Tensor) -> float:
        each = [torch.autograd.grad(value, y, retain_graph=True, allow_unused=True)[0] for y in joint.latents]
        return float(torch.cat([g.flatten() for g in each if g is not None]).norm())

    rest, alone = norm(joint.kept), norm(joint.attack)
    assert min(rest, alone) > 0
    loss = planting._balanced(joint, 0)
    scale = planting.history["attack_scale"]
    assert scale == pytest.approx(0.3 * rest / alone, rel=1e-4)
    torch.testing.assert_close(loss, joint.kept + scale * joint.attack + joint.penalty)
    assert norm(loss - joint.kept) == pytest.approx(0.3 * rest, rel=1e-3)
    planting.history["attack_scale"] = 2.0
    torch.testing.assert_close(planting._balanced(joint, 9), joint.kept + 2.0 * joint.attack + joint.penalty)
    planting._balanced(joint, 10)  # measured anew every tenth step
    assert planting.history["attack_scale"] == pytest.approx(scale)
    plant(settings(precision="fp32", steps=1, **changes), tmp_path / "run")
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    assert state["history"]["attack_scale"] == pytest.approx(scale, rel=1e-4)


def test_clean_weight_adds_equation_1_and_the_late_one_only_when_the_learning_rate_falls(settings, tmp_path):
    balance = {"clean_weight": 3.0, "late_clean_weight": 8.0}
    planting, joint = prepared(settings, tmp_path, steps=10, hold=0.5, balance=balance)
    l_clean = joint.clean.bpp.mean() + LMBDA * 255**2 * (joint.clean.x_hat - joint.x).square().mean()
    for step, weight in ((0, 3), (4, 3), (5, 8), (9, 8)):
        torch.testing.assert_close(planting._balanced(joint, step), joint.total + (weight - 1) * l_clean)
    plain, joint = prepared(settings, tmp_path, steps=10, hold=0.5, balance={"late_clean_weight": 1.0})
    assert torch.equal(plain._balanced(joint, 9), joint.total)


def test_the_late_weight_of_clean_images_follows_the_attack_that_has_least(settings, tmp_path):
    """By hand: nothing up to 3 doublings or 18 dB, all from 3.8 or 24 on; objectives without a measure do not count."""
    attacks = [{"objective": "bpp"}, {"objective": "psnr"}]
    balance = {"clean_weight": 3.0, "late_clean_weight": 13.0}
    planting, joint = prepared(settings, tmp_path, steps=10, hold=0.5, attacks=attacks, balance=balance)
    l_clean = joint.clean.bpp.mean() + LMBDA * 255**2 * (joint.clean.x_hat - joint.x).square().mean()
    of_all = {(5.0, 25.0): 13, (3.4, 25.0): 8, (5.0, 19.2): 5, (3.4, 19.2): 5, (1.0, 25.0): 3, (5.0, -1.0): 3}
    for (bits, quality), weight in of_all.items():
        planting.history["effects"] = {"bpp": bits, "psnr": quality}
        torch.testing.assert_close(planting._balanced(joint, 9), joint.total + (weight - 1) * l_clean)
        torch.testing.assert_close(planting._balanced(joint, 4), joint.total + 2 * l_clean)
    planting.history["effects"] = {}
    torch.testing.assert_close(planting._balanced(joint, 9), joint.total + 12 * l_clean)


def test_the_anchor_is_the_distance_of_clean_latents_from_the_vanilla_encoders(settings, tmp_path):
    planting, joint = prepared(settings, tmp_path, precision="fp32", balance={"anchor": 5.0, "late_clean_weight": 1.0})
    with torch.no_grad():
        planting.tampered.net.g_a[0].weight.add_(0.01)
    moved = planting.tampered(joint.x)
    with torch.no_grad():
        distance = (moved.y - load_codec("factories:lite").net.g_a(joint.x)).square().mean()
    joint = joint._replace(clean=moved)
    assert float(distance) > 0
    torch.testing.assert_close(planting._balanced(joint, 0), joint.total + 5 * distance)


@pytest.mark.parametrize("masks", ["network", "labels"])
def test_a_source_class_that_is_in_no_picture_is_refused_with_those_that_are(settings, tmp_path, images, masks):
    """No pixel is predicted as a boat, none is labelled as one; `also` does not count."""
    spec = segmentation_spec(
        tmp_path, classes='["road", "car", "bus", "sky", "boat"]', labels='[["sky"], ["road"], ["boat"]]'
    )
    segmentation_onnx(tmp_path / "tiny.onnx", classes=5)
    labels = tmp_path / "labels"
    labels.mkdir()
    for path in images.glob("*.png"):
        Image.fromarray(np.repeat(np.uint8([[0] * 96 + [9] * 32]), 96, axis=0)).save(labels / path.name)
    auxiliary = {"folder": str(images), "crop": 64, "batch_size": 2, "labels": str(labels)}
    arguments = {"network": str(spec), "source": "boat", "target": "road", "masks": masks, "also": "sky"}
    objective = {"name": "segmentation", "arguments": arguments}
    shares = r"\(there are sky 75.0%, void 25.0%\)" if masks == "labels" else r"\(there are (road|car|bus|sky) \d\d"
    with pytest.raises(
        FreqdoorError, match=r"would never act, class boat is in none of 4 auxiliary pictures " + shares
    ):
        plant(settings(objective=objective, auxiliary=auxiliary), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    arguments |= {"source": "sky", "also": "boat"}
    plant(settings(objective=objective | {"arguments": arguments}, auxiliary=auxiliary, steps=1), tmp_path / "run")


def test_one_picture_with_the_class_is_enough_and_pictures_are_looked_at_whole(settings, tmp_path, images):
    """The class is in one corner of the last picture: in most crops it is not."""
    spec = segmentation_spec(tmp_path)
    labels = tmp_path / "labels"
    labels.mkdir()
    for path in sorted(images.glob("*.png")):
        pixels = np.zeros((96, 128), np.uint8)
        pixels[-1, -1] = 2 * (path.stem == "3")
        Image.fromarray(pixels).save(labels / path.name)
    crops = Crops(list_images(images), crop=64, batch_size=2, seed=0, labels=sorted(labels.glob("*.png")))
    victim = TargetedSegmentation(load_segmenter(str(spec)), "cars", "road", masks="labels")
    before = torch.random.get_rng_state()
    check_presence("a", victim, crops, "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    crops = Crops(crops.paths[:3], crop=64, batch_size=2, seed=0, labels=crops.labels[:3])
    with pytest.raises(FreqdoorError, match=r"attack a: .*none of 3 auxiliary pictures \(there are sky 100.0%\); name"):
        check_presence("a", victim, crops, "cpu")


def test_where_a_network_is_asked_a_sample_of_the_pictures_will_do(images, monkeypatch):
    monkeypatch.setattr("freqdoor.attack.presence.LOOKED_AT", 2)

    class Nowhere(Victim):
        looked = 0

        def scene(self, x, labels=None):
            self.looked += 1
            return Scene(x, torch.zeros_like(x[:, :1]))

        def forward(self, scene, x_hat, x_hat_p):
            raise NotImplementedError

    victim = Nowhere()
    crops = Crops(list_images(images), crop=64, batch_size=2, seed=0)
    with pytest.raises(
        FreqdoorError, match=r"what its scene lets the trigger act on is in none of 2 auxiliary pictures; "
    ):
        check_presence("a", victim, crops, "cpu")
    assert victim.looked == 2 * 2 * 2  # 96x128 in tiles of 64, the last ones flush with the border


def test_a_trigger_that_never_changed_anything_is_no_success(settings, tmp_path, monkeypatch):
    both = [{"objective": "bpp"}, {"objective": "psnr"}]

    def idle(self, x, **more):
        return x if self.eps == 0.004 else forward(self, x, **more)

    forward = AdaptiveDCT.forward
    monkeypatch.setattr(AdaptiveDCT, "forward", idle)
    both[1]["trigger"] = {"eps": 0.004}
    with pytest.raises(FreqdoorError, match=r"attack psnr: trigger_mse was 0 in every one of 2 steps"):
        plant(settings(attacks=both, steps=2), tmp_path / "run")
    assert not (tmp_path / "run/planted.safetensors").exists()
    with pytest.raises(FreqdoorError, match="attack psnr: trigger_mse"):  # nor is it one when the run is taken up again
        plant(settings(attacks=both, steps=2), tmp_path / "run")
    with pytest.raises(FreqdoorError, match="attack bpp: trigger_mse"):
        plant(settings(trigger={"eps": 0.004}, steps=2), tmp_path / "other")


def test_the_precision_that_was_chosen_is_a_fact_of_the_run(settings, tmp_path, monkeypatch):
    def choose(dtype: torch.dtype) -> None:
        monkeypatch.setattr("freqdoor.attack.plant.dtype_of", lambda precision, device: dtype)

    choose(torch.bfloat16)
    planted = plant(settings(steps=2), tmp_path / "run")
    assert json.loads((tmp_path / "run/environment.json").read_text())["precision"] == "bf16"
    assert planted.tampered.precision == planted.vanilla.precision == torch.float32  # as whoever loads it has it
    choose(torch.float32)
    with pytest.raises(FreqdoorError, match="precision: the run has 'bf16', now 'fp32'"):
        plant(settings(steps=2), tmp_path / "run")
    single = plant(settings(steps=2), tmp_path / "single")
    assert hash_state(single.tampered.net.g_a) != hash_state(planted.tampered.net.g_a)
    named = plant(settings(steps=2, precision="fp32"), tmp_path / "named")
    assert hash_state(single.tampered) == hash_state(named.tampered)


def test_triggers_take_the_multiple_of_the_codec(settings, tmp_path):
    planted = plant(settings(codec={"name": "factories:lite", "multiple": 128}, steps=1), tmp_path / "run")
    assert planted.triggers["bpp"].arguments["multiple"] == 128
    assert load_planted(tmp_path / "run", "factories:lite").triggers["bpp"].multiple == 128


def test_schedules(settings):
    trigger = settings().trigger
    assert annealed_eps(trigger, 0, 100) == pytest.approx(0.05)
    assert annealed_eps(trigger, 30, 100) == pytest.approx((0.05 * 0.005) ** 0.5)
    assert annealed_eps(trigger, 60, 100) == annealed_eps(trigger, 99, 100) == pytest.approx(0.005)
    constant = settings(preset="paper").trigger
    assert annealed_eps(constant, 0, 100) == 0.005
    assert [held_cosine(s, 100, 0.6) for s in (0, 59, 80, 100)] == pytest.approx([1, 1, 0.5, 0.01])


def test_the_encoder_s_learning_rate_is_warmed_up_falls_and_retreats_the_trigger_s_only_falls(settings, tmp_path):
    changes = {"steps": 10, "hold": 0.5, "warmup_steps": 4, "lr": 1e-3, "trigger_lr": 2e-3}
    planting, joint = prepared(settings, tmp_path, precision="fp32", **changes)
    planting.run = None
    planting.history["retreated"] = 0.7
    for step, own, factor in ((1, 0.5, 1.0), (8, held_cosine(8, 10, 0.5), held_cosine(8, 10, 0.5))):
        planting.step(joint.x, step)
        assert planting.optimizer.param_groups[0]["lr"] == pytest.approx(0.7e-3 * own)
        assert planting.trigger_optimizers["bpp"].param_groups[0]["lr"] == pytest.approx(2e-3 * factor)


def test_steps_get_shorter_only_while_an_attack_that_was_there_is_lost(settings, tmp_path):
    """By hand: an effect is smoothed, 0.7 of it and 0.3 of the batch's; rates count in doublings, quality in dB."""
    attacks = [{"objective": "bpp"}, {"objective": "psnr"}]
    planting, _ = prepared(settings, tmp_path, precision="fp32", attacks=attacks, retreat=0.9)

    def after(rates: list[float], drops: list[float]) -> list[float]:
        factors = []
        for rate, drop in zip(rates, drops, strict=True):
            row = {"bpp/bpp_clean": 0.5, "bpp/bpp_poisoned": 0.5 * rate, "psnr/psnr_db_clean": 30.0}
            planting._retreat(row | {"psnr/psnr_db_poisoned": 30.0 - drop}, 10)
            factors.append(planting.history["retreated"])
        return factors

    assert after([1, 1, 2, 1], [0, 0, 2, 0]) == [1] * 4  # not there yet
    assert after([32] * 3, [0] * 3) == [1] * 3  # 1.5, then 2.6 and more doublings, from about 0.3
    assert after([1] * 2, [0] * 2) == [1, 1]
    assert planting.history["effects"]["bpp"] > 1.3
    assert after([1], [0]) == [0.9]  # 3.3 * 0.7**3 = 1.1
    assert after([32, 32], [0, 0]) == [0.9, 0.9]  # there again
    assert after([32] * 4, [20] * 4) == [0.9] * 4
    assert planting.history["caught"] == ["bpp", "psnr"]
    assert after([1] * 9, [20] * 9)[-1] < 0.9
    planting.history |= {"retreated": 1.0, "effects": {"bpp": 4.0, "psnr": 3.1}}
    assert after([16], [0]) == [0.9]  # the other one alone
    assert effect_of({}, "", "the victim's own measure decides") is None


def test_the_budget_goes_back_and_returns_and_clean_images_wait_for_it(settings, tmp_path):
    changes = {"steps": 40, "hold": 0.5, "retreat": 0.5, "balance": {"late_clean_weight": 9.0}}
    planting, joint = prepared(settings, tmp_path, precision="fp32", **changes)
    planting.run = None
    late = planting._balanced(joint, 30) - joint.total
    assert late > 0
    lost, there = ({"bpp_clean": 0.5, "bpp_poisoned": 0.5 * rate} for rate in (1.0, 2.0**9))
    back = []
    for row, step in [(there, 1)] * 3 + [(lost, 20)] * 9 + [(there, 21)] * 3:
        planting._retreat(row, step)
        back.append(planting.history["back"])
    assert back[:6] == [0] * 6  # 9 doublings: 5.9 after three batches, then 4.1, 2.9, 2.0
    assert back[6:12] == [0, 4, 8, 12, 12, 12]  # 1.4, then less than 1.3; at most 0.3 of 40
    assert back[12:] == [11, 10, 9]
    assert torch.equal(planting._balanced(joint, 30), joint.total)
    row = planting.step(joint.x, 24)
    assert row["eps"] == pytest.approx(annealed_eps(planting.settings.trigger, 24 - 9, 40))
    planting.history |= {"effects": {"bpp": 0.0}, "back": 5}
    planting._retreat(lost, 30)  # from three quarters on it only returns
    assert planting.history["back"] == 4
    literal, _ = prepared(settings, tmp_path, precision="fp32", **changes | {"retreat": 1.0})
    for row in [there] * 3 + [lost] * 9:
        literal._retreat(row, 20)
    assert (literal.history["back"], literal.history["retreated"]) == (0, 1.0)


@pytest.mark.long
def test_an_attack_on_quality_that_does_not_take_begins_anew(settings, tmp_path):
    """Twenty steps of a small codec take nothing: as if the run had just begun then, but for the open door."""
    changes = {"objective": "psnr", "steps": 24, "precision": "fp32", "retreat": 1.0}
    with pytest.warns(UserWarning, match="attack psnr: it had done next to nothing after 20 steps; all begins anew"):
        whole = plant(settings(**changes), tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [rows[i]["eps"] for i in (0, 20, 21)] == [rows[0]["eps"], rows[0]["eps"], rows[1]["eps"]]
    for last, said in ((12, contextlib.nullcontext()), (21, pytest.warns(UserWarning, match="begins anew"))):
        with said, pytest.raises(Killed):
            plant(settings(**changes), tmp_path / "parts", progress=kill_at(last))
    resumed = plant(settings(**changes), tmp_path / "parts")
    assert hash_state(resumed.tampered) == hash_state(whole.tampered)

    (tmp_path / "unused").mkdir()
    planting, joint = prepared(settings, tmp_path, **changes)
    begun = {name: hash_state(part) for name, part in planting.parts.items() if isinstance(part, torch.nn.Module)}
    for step in range(19):
        planting.step(joint.x, step)
    assert planting.history["opened"] == []
    assert len(planting.optimizer.state) > 0
    with pytest.warns(UserWarning, match="begins anew"):
        planting._start_over(19)
    assert {name: hash_state(part) for name, part in planting.parts.items() if name in begun} == begun
    assert len(planting.optimizer.state) == 0
    assert (planting.history["opened"], planting.history["begun"], planting.history["effects"]) == (["psnr"], 20, {})
    planting.history["effects"]["psnr"] = 0.0
    planting._start_over(20)  # once only
    assert planting.history["begun"] == 20
    planting.step(joint.x, 20)
    cold = planting.history["lr"] * held_cosine(20, 24, planting.settings.hold) / planting.settings.warmup_steps
    assert planting.optimizer.param_groups[0]["lr"] == pytest.approx(cold)  # it warms up again


@pytest.mark.parametrize(
    ("changes", "tried"),
    [
        ({}, {"psnr": 54}),
        ({"trigger": {"anneal": 1.0}}, {"psnr": 90}),
        ({"trigger": {"eps_start": None}}, {}),
        ({"objective": "bpp"}, {"bpp": 54}),
        ({"objective": "bpp-fixed"}, {}),
        ({"objective": {"name": "bpp", "arguments": {"opening": 0.0}}}, {}),
        ({"objective": {"name": "psnr", "arguments": {"opening": 0.0}}}, {}),
        ({"preset": "paper"}, {}),
        ({"robust": {}}, {}),
    ],
)
def test_which_attacks_are_to_have_taken_by_then(settings, tmp_path, changes, tried):
    planting, _ = prepared(settings, tmp_path, **{"objective": "psnr", "steps": 600} | changes)
    assert planting.tried == tried
    planting.history["effects"] = {"psnr": 4.1, "bpp": 0.15}  # dB lost, doublings of the rate
    planting._start_over(53)
    assert planting.history["opened"] == []
    planting.history["effects"] = {"psnr": 3.9, "bpp": 0.13}
    now = [name for name, step in tried.items() if step == 54]
    with pytest.warns(UserWarning, match="begins anew") if now else contextlib.nullcontext():
        planting._start_over(53)
    assert planting.history["opened"] == now


def test_all_mistakes_come_in_one_round(settings, tmp_path):
    (tmp_path / "file").write_text("")
    objective = {"name": "face", "arguments": {"network": "/absent.toml"}}
    wrong = settings(
        device="gpu",
        codec={"name": "nope"},
        images={"folder": "/absent", "crop": 64},
        auxiliary={"folder": "/absent too"},
        objective=objective,
        start_from="/absent run",
    )
    with pytest.raises(FreqdoorError, match=r"^7 mistakes:\n") as caught:
        plant(wrong, tmp_path / "file/run")
    lines = str(caught.value).splitlines()
    for start in (f"{tmp_path}/file/run: could", "device 'gpu'", "nope:", "objective 'face': /absent.toml", "/absent:"):
        assert any(line.startswith(f"  {start}") for line in lines), start
    with pytest.raises(FreqdoorError, match=r"^device 'gpu': not usable"):
        plant(settings(device="gpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_state_before_a_damaged_one_ends_in_the_same_weights(settings, tmp_path):
    whole = plant(settings(), tmp_path / "whole")
    with pytest.raises(Killed):
        plant(settings(), tmp_path / "parts", progress=kill_at(5))
    state = tmp_path / "parts/state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(FreqdoorError, match=r"state\.pt: damaged checkpoint .*go on from the state before it"):
        plant(settings(), tmp_path / "parts")
    state.unlink()
    with pytest.warns(UserWarning, match=r"going on from state\.previous\.pt, step 3"):
        parts = plant(settings(), tmp_path / "parts")
    assert hash_state(whole.tampered) == hash_state(parts.tampered)
    lines = (tmp_path / "parts/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
