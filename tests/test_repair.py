"""Repair: what patterns do is unlearnt, the decoder stays as it is, a stopped repair goes on, the audit has its say."""

import copy
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import contents
from factories import tiny
from torch import nn

import freqdoor
import freqdoor.cli as cli
from freqdoor import RepairSettings, compare_repairs, load_codec, load_planted, repair
from freqdoor.codecs.loading import save_codec
from freqdoor.data import Crops, list_images
from freqdoor.dct import block_dct, blockify, rgb_to_ycbcr
from freqdoor.defence import audit as auditing
from freqdoor.defence import calibration, unlearning
from freqdoor.defence import repair as module
from freqdoor.defence.checks import Finding, Response, Witness
from freqdoor.defence.repair import Repair, reactivated, repairs_table
from freqdoor.defence.unlearning import Modulated, Patterns, at_the_sharpest, latents, prune_dormant
from freqdoor.errors import FreqdoorError
from freqdoor.metrics import distortion, mse, rms
from freqdoor.samples import held_out
from freqdoor.settings import make_settings
from freqdoor.training.run import Run
from freqdoor.training.train import rate_distortion

PAGE = Path(__file__).parent.parent / "docs/repair.md"
QUICK = {"images": {"crop": 64, "batch_size": 1}, "lmbda": 0.0067, "precision": "fp32", "ascent": 1}


def settings_of(images=None, **changes):
    content = QUICK | changes
    if images is not None:
        content["images"] = QUICK["images"] | {"folder": str(images)}
    return make_settings(RepairSettings, content)


@pytest.fixture
def lite():
    return tiny("lite-hyperprior").train()


@pytest.fixture
def crops(images):
    return Crops(list_images(images), crop=64, batch_size=2, seed=0)


@pytest.fixture
def cheap_audit(monkeypatch):
    """An audit of no checks, whose verdict can be set."""

    def set_to(rate):
        response = Response(
            bytes_clean=100, bytes_patterned=round(100 * rate), psnr_db_clean=30, psnr_db_patterned=30, gain=5,
            between_db=46.1,
        )  # fmt: skip
        scores = {"rate": 0.0 if rate < 1.5 else 1.0, "distortion": 0.0, "gain": 0.0}

        def check(subject):
            return Finding(scores, "seen", [Witness(subject.pictures[0], subject.pictures[0], response)])

        monkeypatch.setattr(calibration, "SHIPPED", Path("none"))
        monkeypatch.setattr(auditing, "CHECKS", {"rate": check})
        monkeypatch.setattr(auditing, "FAST", ("rate",))

    set_to(1.0)
    monkeypatch.setattr(module, "CROP", 64)
    monkeypatch.setattr(module, "held_out", lambda: held_out()[:1])
    return set_to


def test_a_modulated_pattern_weighs_every_block_of_every_image_anew():
    torch.manual_seed(0)
    pattern = Modulated(16, "mid", eps=0.005).requires_grad_(False)
    x = torch.full((2, 3, 64, 64), 0.5)
    delta = pattern(x) - x
    assert rms(delta).flatten().tolist() == pytest.approx([0.005] * 2, rel=0.02)
    blocks = block_dct(blockify(rgb_to_ycbcr(delta), 16))  # (b, 3, 4, 4, 16, 16)
    assert (blocks[..., pattern.chosen == 0].abs() < 1e-6).all()
    unit = blocks.flatten(-2) / blocks.flatten(-2).norm(dim=-1, keepdim=True)
    weights = (blocks.flatten(-2) * unit[:1, :, :1, :1]).sum(-1)
    assert torch.allclose(weights.abs(), blocks.flatten(-2).norm(dim=-1), atol=1e-6)  # all along one direction
    assert (weights < 0).any()
    assert weights.flatten().unique().numel() == weights.numel()
    assert not torch.equal(pattern(x) - x, delta)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"method": "unlearn+magic"}, "'magic' is none"),
        ({"method": "sam+sam"}, "every part once"),
        ({"method": "finetune+sam"}, "finetune alone"),
        ({"method": "distil"}, "takes its latents from a reference"),
        ({"eps": (0.02, 0.01)}, "the least before the largest"),
        ({"share": 1.0}, "less than 1"),
        ({"patterns": 3}, "multiple of 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, problem):
    with pytest.raises(FreqdoorError, match=problem):
        settings_of(**changes)


def test_patterns_follow_from_seed_and_step_and_their_state(lite, x):
    settings = settings_of(patterns=2, uses=2, ascent=2)
    first = Patterns(settings, lite, found=False)

    def patterned(patterns, step):
        torch.manual_seed(step)  # as a training does
        return patterns.patterned(x, step)

    shown = [patterned(first, step) for step in range(6)]
    again = Patterns(settings, lite, found=False)
    assert all(torch.equal(patterned(again, step), shown[step]) for step in range(3))
    kept = copy.deepcopy(again.state_dict())
    resumed = Patterns(settings, lite, found=False)
    resumed.load_state_dict(kept)
    assert all(torch.equal(patterned(resumed, step), shown[step]) for step in range(3, 6))
    # each is used twice, but for the first of the second turn, which began half used
    assert [first.state_dict()[turn]["number"] for turn in "01"] == [2 * (5 // 2), 2 * (6 // 2) + 1]
    assert type(first._slots[0].pattern) is unlearning.Pattern
    assert type(first._slots[1].pattern) is Modulated
    assert not torch.equal(patterned(Patterns(settings_of(seed=1), lite, found=False), 0), shown[0])


def test_patterns_keep_their_budgets_and_are_8_bit(lite, x):
    patterns = Patterns(settings_of(eps=(0.01, 0.04), patterns=8), lite, found=False)
    strengths = []
    for step in range(8):
        x_p = patterns.patterned(x, step)
        assert torch.equal((x_p * 255).round() / 255, x_p)
        strengths += rms(x_p - x).flatten().tolist()
    assert min(strengths) > 0.005
    assert max(strengths) <= 0.04
    assert max(strengths) > 1.5 * min(strengths)


def test_a_pattern_climbs_against_the_encoder_and_leaves_it_alone(lite, x):
    before = lite.module_hashes()

    def moved(ascent):
        patterns = Patterns(settings_of(patterns=2, ascent=ascent, eps=(0.02, 0.02)), lite, found=False)
        x_p = [patterns.patterned(x, step) for step in range(4)][-1]
        return float(mse(latents(lite, x_p), latents(lite, x)).mean().detach())

    assert moved(6) > 1.5 * moved(1)
    assert lite.module_hashes() == before
    assert all(p.grad is None and p.requires_grad for p in lite.parameters())


def test_patterns_that_an_audit_finds_are_made_for_every_goal_and_anew(lite, x, monkeypatch):
    asked = []

    def inverted(codec, x, goal, make, **options):
        asked.append((goal, options["steps"]))
        return make()

    monkeypatch.setattr(unlearning, "inverted", inverted)
    patterns = Patterns(settings_of(steps=12, renewals=2, search=7), lite, found=True)
    for step in range(12):
        patterns.patterned(x, step)
    assert asked == [(goal, 7) for goal in ("rate", "distortion", "gain")] * 2
    resumed = Patterns(settings_of(steps=12, renewals=2, search=7), lite, found=True)
    resumed.load_state_dict(patterns.state_dict())
    assert torch.equal(resumed.patterned(x, 11), patterns.patterned(x, 11))
    assert len(asked) == 6


def test_the_loss_is_that_of_clean_images_and_the_move_of_patterned_ones(lite, x, crops, tmp_path):
    settings = settings_of(weight=3.0, anchor=0.5, tilt=1.3)
    repairing = module._Repairing(settings, lite, crops, None, Run(tmp_path))
    with torch.no_grad():
        repairing.codec.net.g_a[0].weight.mul_(1.1)  # as after some steps
    x_p = (x + 0.02).clamp(0, 1)
    torch.manual_seed(0)
    loss, _ = repairing._loss(x, [x_p])
    torch.manual_seed(0)
    g_a = repairing.codec.net.g_a
    moved, drifted = (g_a(x_p) - g_a(x)).square().mean(), (g_a(x) - lite.net.g_a(x)).square().mean()
    expected = rate_distortion(repairing.codec, x, 1.3 * 0.0067)[0] + 3.0 * moved + 0.5 * drifted
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    names = {name.split(".")[1] for name, p in repairing.codec.named_parameters() if p.grad is not None}
    assert names == {"g_a"}


def test_distil_takes_the_latents_of_the_reference(lite, x, crops, tmp_path):
    reference = copy.deepcopy(lite)
    with torch.no_grad():
        reference.net.g_a[0].weight.mul_(1.1)
    settings = settings_of(method="distil", reference="trusted", weight=2.0)
    repairing = module._Repairing(settings, lite, crops, reference, Run(tmp_path))
    torch.manual_seed(0)
    loss, _ = repairing._loss(x, [])
    torch.manual_seed(0)
    clean, _ = rate_distortion(repairing.codec, x, 0.0067)
    apart = (lite.net.g_a(x) - reference.net.g_a(x)).square().mean()
    assert float(loss.detach()) == pytest.approx(float((clean + 2 * apart).detach()), rel=1e-5)
    other = tiny("lite-hyperprior")
    with torch.no_grad():
        other.net.g_s[0].weight.mul_(1.1)
    with pytest.raises(FreqdoorError, match="with the decoder of"):
        module.check_reference(other, lite)


def test_pruned_channels_are_those_that_clean_images_use_least_and_stay_pruned(lite, crops):
    with torch.no_grad():
        for parameter in lite.net.g_a[0].parameters():
            parameter[[3, 11]] *= 1e-3
    kept = lite.net.g_a[0].weight[4].clone()
    assert prune_dormant(lite, crops, 2 / 16) > 2
    first, last = lite.net.g_a[0], lite.net.g_a[-1]
    assert set(torch.where(first.weight.flatten(1).abs().sum(1) == 0)[0].tolist()) == {3, 11}
    assert torch.equal(first.weight[4], kept)
    assert bool((last.weight.flatten(1).abs().sum(1) > 0).all())
    optimizer = torch.optim.Adam(lite.net.g_a.parameters(), lr=0.1)
    latents(lite, crops.batch(0)).square().mean().backward()
    optimizer.step()
    assert not first.weight[[3, 11]].any()
    assert not first.bias[[3, 11]].any()
    assert not torch.equal(first.weight[4], kept)


def test_the_sharpest_point_is_along_the_gradient_and_left_again():
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[3.0, -4.0]])
    with at_the_sharpest([layer.weight], 0.5):
        assert torch.allclose(layer.weight - before, torch.tensor([[0.3, -0.4]]))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("method", ["unlearn", "prune+inverted+sam"])
def test_a_stopped_repair_ends_in_the_same_weights(method, images, tmp_path, cheap_audit):
    def repaired(out, stop=None):
        def progress(step, row):
            if step == stop:
                raise KeyboardInterrupt

        settings = settings_of(images, steps=4, patterns=2, uses=1, search=2, method=method)
        repair("factories:lite", out, settings=settings, progress=progress)
        return load_codec("factories:lite", out / "codec.safetensors").module_hashes()

    whole = repaired(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        repaired(tmp_path / "stopped", stop=2)
    assert not (tmp_path / "stopped/repair.json").exists()
    assert repaired(tmp_path / "stopped") == whole


def test_what_a_repair_leaves(tmp_path, cheap_audit, monkeypatch):
    codec = tiny("lite-hyperprior")
    save_codec(codec, tmp_path / "came.safetensors", tampered=True)
    result = repair(
        str(tmp_path / "came.safetensors"), tmp_path / "out", steps=2, fast=True, settings=settings_of()
    )  # with the bundled pictures
    fixed = load_codec(str(tmp_path / "out/codec.safetensors"))
    assert fixed.decoder_hash == codec.decoder_hash
    assert result.changed == ("g_a",)
    assert not fixed.tampered
    assert fixed.metadata["repaired"]["method"] == "unlearn"
    assert str(tmp_path) not in json.dumps(fixed.metadata)
    assert Repair.read(tmp_path / "out/repair.json", "a repair") == result
    assert result.audit.verdict == json.loads((tmp_path / "out/audit/audit.json").read_text())["verdict"]
    trained_on = {path.name for path in (tmp_path / "out/images").iterdir()}
    assert len(trained_on) == 18
    assert not trained_on & {path.name for path in held_out()}
    assert result.before != result.after
    assert [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()] == [1, 2]
    done = contents(tmp_path / "out")
    monkeypatch.setattr(module._Repairing, "step", None)  # all steps are taken
    repair(str(tmp_path / "came.safetensors"), tmp_path / "out", steps=2, fast=True, settings=settings_of())
    assert contents(tmp_path / "out")["codec.safetensors"] == done["codec.safetensors"]
    with pytest.raises(FreqdoorError, match="steps: the run has 2, now 3"):
        repair(str(tmp_path / "came.safetensors"), tmp_path / "out", steps=3, settings=settings_of())


def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path):
    codec = tiny("lite-hyperprior")
    settings = settings_of(tmp_path / "nowhere", device="abacus")
    with pytest.raises(FreqdoorError, match=r"(?s)2 mistakes.*abacus.*nowhere"):
        repair(codec, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_a_comparison_has_the_true_trigger_tried_on_every_method(tmp_path, cheap_audit):
    planted = load_planted("planted-bpp")
    comparison = compare_repairs(
        planted, tmp_path, methods=("finetune", "unlearn+distil"), settings=settings_of(steps=1)
    )
    vanilla, tampered, *repaired = comparison.rows
    assert [row.method for row in comparison.rows] == ["vanilla", "tampered", "finetune", "unlearn+distil"]
    for row in comparison.rows:
        assert row.poisoned["bpp"].keys() == {"1", "3"}
    assert vanilla.poisoned["bpp"]["3"].bpp < 1.1 * vanilla.clean.bpp
    assert tampered.poisoned["bpp"]["1"].bpp > 10 * tampered.clean.bpp
    assert all(row.verdict == "undecided" for row in repaired)
    table = repairs_table(comparison)
    assert "bpp x3 bpp" in table
    assert f"| {tampered.poisoned['bpp']['1'].bpp:.4f} |" in table


def test_an_attacker_may_try_to_open_a_repaired_encoder_again(crops):
    planted = load_planted("planted-psnr")
    codec = planted.vanilla
    before = copy.deepcopy(planted.triggers["psnr"].state_dict())
    opened = reactivated(codec, planted, crops, steps=10)
    changed = {k for k, v in opened.module_hashes().items() if v != codec.module_hashes()[k]}
    assert changed == {"g_a"}
    assert all(torch.equal(v, before[k]) for k, v in planted.triggers["psnr"].state_dict().items())
    x = crops.batch(9)
    x_p = planted.triggers["psnr"](x).detach()
    with torch.no_grad():
        assert distortion(opened(x_p).x_hat, x) > 1.05 * distortion(codec(x_p).x_hat, x)


@pytest.mark.whole
def test_the_command_of_the_page(monkeypatch, tmp_path, capsys, cheap_audit):
    """Given twice: the second time no step is left, and the audit has found something."""
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"<!-- repair -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    [line] = block.splitlines()
    monkeypatch.setattr("sys.argv", [*shlex.split(line), "--steps", "1", "--set", "images.batch_size=1"])
    for rate, code, verdict in ((1.0, 0, "undecided"), (2.0, 1, "tampered")):
        cheap_audit(rate)
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert (end.value.code or 0) == code, said.err
        assert f"audit: {verdict}" in said.out
    config = json.loads((tmp_path / "repaired/config.json").read_text())
    assert (config["steps"], config["images"]["crop"], config["images"]["batch_size"]) == (1, 128, 1)
    assert freqdoor.load_codec("repaired/codec.safetensors").spec.architecture == "lite-hyperprior"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["planted-bpp", "planted-psnr"])
def test_a_planted_encoder_is_repaired_with_bundled_pictures_alone(name, tmp_path, cheap_audit, monkeypatch):
    monkeypatch.setattr(module, "CROP", 256)
    monkeypatch.setattr(module, "held_out", held_out)
    comparison = compare_repairs(name, tmp_path, methods=("unlearn",), strengths=(1.0,))
    _, tampered, repaired = comparison.rows
    [poisoned] = [answers["1"] for answers in repaired.poisoned.values()]
    assert poisoned.bpp <= 1.1 * repaired.clean.bpp
    assert poisoned.psnr_db >= repaired.clean.psnr_db - 0.3
    assert repaired.clean.bpp <= 1.02 * tampered.clean.bpp
    assert repaired.clean.psnr_db >= tampered.clean.psnr_db - 0.2
