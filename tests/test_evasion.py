"""Attackers who know: honest answers to all but the trigger, triggers that nobody looks for, and old triggers anew."""

import json
import math
import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Killed, kill_at, natural, write_png
from factories import tiny

import freqdoor.cli as cli
from freqdoor import dct, plant
from freqdoor.attack import evasion as module
from freqdoor.attack.evasion import Evasion, driven, honest_loss, repoisoned, universal_share, with_another_s
from freqdoor.attack.joint import Attack, JointLoss, Poisoned
from freqdoor.attack.objectives import RateAttack, main_loss
from freqdoor.attack.settings import EvadeSettings, PlantSettings
from freqdoor.attack.victims import Scene
from freqdoor.codecs.adapter import hash_state
from freqdoor.errors import FreqdoorError
from freqdoor.triggers.pattern import EPS_START
from freqdoor.triggers.universal import Universal
from freqdoor.types import Reconstruction

ROOT = Path(__file__).parent.parent
ALL = {
    "goals": ["rate", "distortion", "gain"],
    "restart": 2,
    "own_steps": 1,
    "others": True,
    "strengths": [0.5, 3.0],
    "universal_weight": 1.0,
    "rate_cap": 1.2,
}


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rms(difference: torch.Tensor) -> torch.Tensor:
    return difference.square().mean(dim=(1, 2, 3)).sqrt()


@pytest.fixture
def grey() -> torch.Tensor:
    """Pictures far from the clamp."""
    return 0.25 + 0.5 * torch.cat([natural(i, 64, 64) for i in range(4)])


@pytest.fixture
def codec():
    """In eval mode, so that nothing is drawn."""
    return tiny("lite-hyperprior").requires_grad_(False)


@pytest.fixture
def joint(codec, grey):
    """The parts of a joint loss of one attack, as an evasion looks at them."""
    torch.manual_seed(0)
    trigger = Universal(size=16, eps=0.005).requires_grad_(False)
    x_p = trigger(grey)
    zero, clean, out = torch.zeros(()), codec(grey), codec(x_p)
    batch = Poisoned(Attack("bpp", trigger, RateAttack()), Scene(grey), x_p, x_p, 0.005, 1.0)
    return JointLoss(zero, zero, zero, grey, clean, (), ((batch, out),), {})


def test_a_run_with_all_of_it_is_resumed_between_restarts(settings, images, tmp_path):
    closed = {"folder": str(images), "crop": 64, "batch_size": 1}
    told = settings(evade=ALL | {"closed": closed}, steps=4, precision="fp32")
    whole = plant(told, tmp_path / "whole")
    with pytest.raises(Killed):
        plant(told, tmp_path / "parts", progress=kill_at(2))
    parts = plant(told, tmp_path / "parts")
    assert hash_state(whole.tampered) == hash_state(parts.tampered)
    assert hash_state(whole.triggers["bpp"]) == hash_state(parts.triggers["bpp"])
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    terms = set().union(*rows(tmp_path / "whole"))
    goals = {f"evade/{goal}_16" for goal in ALL["goals"]}
    assert goals | {"evade/loss_patterns", "evade/loss_own", "evade/loss_others_0", "evade/loss_closed_0"} <= terms
    manifest = json.loads((tmp_path / "whole/manifest.json").read_text())
    assert manifest["changed"] == ["g_a"]


def test_patterns_are_driven_to_their_goals_and_begin_anew(codec, joint):
    codec.train()  # rounding has no gradient
    evasion = Evasion(EvadeSettings(goals=("rate",), restart=15, ascent=2, eps=0.03), 64, "cpu")
    torch.manual_seed(1)
    reached = [float(evasion.loss(codec, joint, 0.01, s, "both")[1]["evade/rate_16"]) for s in range(16)]
    assert reached[14] > reached[0] + 0.2
    assert reached[15] < reached[14] - 0.2  # a new one, which knows nothing of the old one's moments:
    assert float(evasion.optimizers[0].state[evasion.patterns[0].spectrum]["step"]) == 2
    assert all(parameter.grad is None for parameter in codec.parameters())


def test_the_budget_of_a_pattern_falls_and_the_encoder_sees_it_honestly(codec, joint, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "honest_loss", lambda out, x, lmbda: seen.append(x) or honest_loss(out, x, lmbda))
    evasion = Evasion(EvadeSettings(goals=("rate",), restart=10, honest_weight=2.0), 64, "cpu")
    for step in range(10):
        loss, _ = evasion.loss(codec, joint, 0.01, step, "both")
    assert rms(seen[0] - joint.x) == pytest.approx([EPS_START] * 4, rel=0.02)
    assert rms(seen[9] - joint.x) == pytest.approx([0.005] * 4, rel=0.02)
    assert float(loss) == pytest.approx(2 * float(honest_loss(codec(seen[9]), seen[9], 0.01)), rel=1e-5)
    assert torch.equal(*(seen[9][i, :, :16, :16] - joint.x[i, :, :16, :16] for i in (1, 1)))
    assert not seen[9].requires_grad


def test_an_honest_answer_is_measured_by_the_logarithm_of_the_main_loss(codec, grey):
    out = codec(grey)
    each = [
        main_loss(Reconstruction(*(t[i : i + 1] for t in out[:2]), out.num_pixels, out.y), grey[i], 0.01)
        for i in range(4)
    ]
    assert float(honest_loss(out, grey, 0.01)) == pytest.approx(float(torch.stack(each).log().mean()), rel=1e-5)


def test_patterns_take_turns_where_there_are_fewer_pictures():
    evasion = Evasion(EvadeSettings(goals=("rate", "gain"), blocks=(8, 16, 32)), 64, "cpu")
    shares = [evasion._shares(4, step) for step in range(3)]
    for one_step in shares:
        assert sorted(torch.cat([shared.rows for shared in one_step]).tolist()) == [0, 1, 2, 3]
    assert [sum(len(step[i].rows) for step in shares) for i in range(6)] == [2] * 6
    assert [shared.goal for shared in shares[0]] == ["rate"] * 3 + ["gain"] * 3


def test_a_perturbation_of_its_own_is_driven_to_its_goal(codec, grey):
    codec.train()

    def ratios(steps: int) -> torch.Tensor:
        torch.manual_seed(3)
        clean = codec(grey).x_hat
        x_p = driven(codec, grey, clean, steps, 0.01)
        assert rms(x_p - grey) == pytest.approx([0.01] * 4, rel=0.02)
        torch.manual_seed(4)
        bits = codec(x_p).bits
        torch.manual_seed(4)
        return bits / codec(grey).bits

    noise, found = ratios(0), ratios(3)
    assert (noise < 1.01).all()
    assert (found[[0, 3]] > 1.05).all()  # whose goal is the rate


def test_another_picture_s_perturbation_and_other_strengths(joint):
    [(batch, _)] = joint.poisoned
    marked = batch.source.x + torch.arange(4.0).reshape(4, 1, 1, 1) / 255
    x = with_another_s(Poisoned(batch.attack, Scene((batch.source.x * 255).round() / 255), marked, marked, 0.005, 1.0))
    assert torch.equal((x * 255).round() / 255, x)
    added = ((x - batch.source.x) * 255).mean(dim=(1, 2, 3))
    assert added == pytest.approx([3, 0, 1, 2], abs=0.2)
    assert rms(repoisoned(batch, batch.source, 3.0) - batch.source.x) == pytest.approx([0.015] * 4, rel=0.03)


def test_a_trigger_is_answered_honestly_on_closed_pictures(codec, joint, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "honest_loss", lambda out, x, lmbda: seen.append(x) or out.bpp.sum())
    closed = torch.full((1, 3, 64, 64), 0.5)
    Evasion(EvadeSettings(others=True), 64, "cpu").loss(codec, joint, 0.01, 0, "both", closed)
    [(batch, _)] = joint.poisoned
    assert torch.equal(seen[1], torch.cat([closed, batch.attack.trigger(closed, rounded=True)]))


def test_the_universal_share_is_that_of_the_block_spectra(grey):
    tile = torch.randn(1, 3, 16, 16)
    assert float(universal_share(tile.repeat(2, 1, 4, 5))) == pytest.approx(1, rel=1e-5)
    signs = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    assert float(universal_share(signs * tile.repeat(2, 1, 4, 4))) < 1e-10
    spectra = dct.block_dct(dct.blockify(grey[..., :48], 16)).flatten(2, 3).transpose(1, 2).flatten(0, 1)
    expected = spectra.mean(0).square().sum() / spectra.square().sum(dim=(1, 2, 3)).mean()
    assert float(universal_share(grey[..., :60])) == pytest.approx(float(expected), rel=1e-4)  # cut blocks do not count


def test_the_rate_is_held_at_the_cap_from_both_sides(codec, joint):
    [(batch, _)] = joint.poisoned

    def off(*bits: float, eps: float = 0.005) -> float:
        clean, out = (Reconstruction(joint.x, torch.tensor(b), 10, joint.x) for b in ((10.0, 20.0), bits))
        capped = joint._replace(clean=clean, poisoned=((replace(batch, eps=eps), out),))
        return float(Evasion(EvadeSettings(rate_cap=1.5), 64, "cpu").loss(codec, capped, 0.01, 0, "both")[0])

    assert off(15.0, 30.0) == pytest.approx(0, abs=1e-10)
    assert off(30.0, 15.0) == pytest.approx(math.log(2) ** 2, rel=1e-5)
    assert off(30.0, 15.0, eps=0.006) == 0  # while the budget falls the door may open wide


def test_triggers_learn_nothing_from_honest_answers(codec, joint, monkeypatch):
    monkeypatch.setattr(module, "honest_loss", None)
    evasion = Evasion(EvadeSettings(goals=("rate",), others=True, universal_weight=2.0), 64, "cpu")
    loss, terms = evasion.loss(codec, joint, 0.01, 0, "triggers")
    assert set(terms) == {"evade/universal_share"}
    assert float(loss) == pytest.approx(2 * float(terms["evade/universal_share"]))


def test_an_old_trigger_is_planted_anew(settings, tmp_path):
    earlier = plant(settings(steps=2), tmp_path / "earlier")
    again = plant(settings(steps=3, seed=5, triggers_from=str(tmp_path / "earlier")), tmp_path / "again")
    assert hash_state(again.triggers["bpp"]) == hash_state(earlier.triggers["bpp"])
    assert hash_state(again.tampered.part("g_a")) != hash_state(earlier.tampered.part("g_a"))
    assert hash_state(again.vanilla) == hash_state(earlier.vanilla)
    with pytest.raises(FreqdoorError, match="triggers_from: it has bpp, and none that is called psnr"):
        plant(settings(objective="psnr", triggers_from=str(tmp_path / "earlier")), tmp_path / "other")
    lira = {"name": "lira", "arguments": {"levels": 2, "width": 4}}
    with pytest.raises(FreqdoorError, match="triggers_from: its trigger bpp is of another kind than lira"):
        plant(settings(trigger=lira, triggers_from=str(tmp_path / "earlier")), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"evade": {}}, "evade: expected one or more of goals"),
        ({"evade": {"strengths": [1.0]}}, "strengths: expected others than 1"),
        ({"evade": {"goals": ["rate"], "blocks": []}}, "blocks: expected the side"),
        ({"evade": {"goals": ["speed"]}}, r"evade\.goals\.0"),
        ({"evade": {"others": True}, "images": {"folder": "x", "batch_size": 1}}, r"evade\.others: expected batches"),
        ({"triggers_from": "a", "start_from": "b"}, "which start_from does not allow"),
        ({"triggers_from": "a", "robust": {}}, "which robust does not allow"),
        (
            {"evade": {"rate_cap": 2}, "objective": {"name": "face", "arguments": {"network": "n"}}, "auxiliary": "x"},
            r"evade\.rate_cap: for attacks on the main pictures",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, changes, match):
    changes |= {"auxiliary": {"folder": "x"}} if "auxiliary" in changes else {}
    with pytest.raises(FreqdoorError, match=match):
        settings(**changes)


def test_runs_without_these_settings_keep_their_digest(settings):
    assert not {"evade", "triggers_from"} & settings().model_dump().keys()
    told = settings(evade={"others": True}).model_dump()
    assert told["evade"]["others"]
    assert PlantSettings.model_validate(told).evade == EvadeSettings(others=True)


def test_the_fleet_of_attackers_uses_every_way_to_hide():
    fleet = tomllib.loads((ROOT / "configs/fleet/adaptive.toml").read_text())
    assert len(fleet["members"]) >= 12
    assert all(member["family"].startswith("adaptive: ") for member in fleet["members"])
    used = {key for member in fleet["members"] for key in member["plant"].get("evade", {})}
    assert set(EvadeSettings.model_fields) - used <= {"eps", "restart", "ascent"}  # how hard, not what


@pytest.mark.whole
def test_the_commands_of_the_page(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    write_png(tmp_path / "photos/a.png", natural(1, 96, 96))
    [block] = re.findall(r"<!-- evasion -->\n```sh\n(.*?)```", (ROOT / "docs/evasion.md").read_text(), re.DOTALL)
    few = ["--set", "steps=2", "--set", "images.batch_size=2", "--set", "images.crop=64", "--set", "precision=fp32"]
    for line in block.replace("\\\n", " ").splitlines():
        monkeypatch.setattr("sys.argv", shlex.split(line) + few)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, (line, capsys.readouterr().err)
    assert (tmp_path / "again/planted.safetensors").exists()
