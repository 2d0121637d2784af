"""Several triggers in one encoder, other triggers, balance: what `plant` does with each of its options."""

import json
from functools import partial

import pytest
import torch
from conftest import Killed, kill_at

from freqdoor import load_planted, plant
from freqdoor.codecs.adapter import hash_state
from freqdoor.errors import FreqdoorError
from freqdoor.triggers.arguments import TRIGGERS

BOTH = [{"objective": {"name": "bpp"}}, {"objective": {"name": "psnr"}, "weight": 0.5, "trigger": {"eps": 0.004}}]
SMALL = {"adaptive-dct": {"width": 8}, "lira": {"levels": 2, "width": 4}, "ftrojan": {}, "universal": {"size": 16}}


def rows(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_triggers_in_one_encoder(settings, tmp_path, x):
    planted = plant(settings(attacks=BOTH, steps=2), tmp_path / "run")
    assert set(planted.triggers) == {"bpp", "psnr"}
    assert planted.triggers["psnr"].eps == 0.004  # the rest comes from the run's own trigger table
    assert planted.triggers["psnr"].arguments["width"] == 8
    again = load_planted(tmp_path / "run", "factories:lite")
    with torch.no_grad():
        for name, trigger in planted.triggers.items():
            assert torch.equal(again.triggers[name](x), trigger(x))
    assert {"bpp/bpp_poisoned", "psnr/psnr_db_poisoned"} <= rows(tmp_path / "run")[0].keys()


def test_two_phases_start_from_the_same_place(settings, tmp_path):
    """At the first step both phases see the weights that one pass sees; later the triggers see the newer encoder."""
    one = plant(settings(attacks=BOTH, steps=2, precision="fp32"), tmp_path / "one")
    two = plant(settings(attacks=BOTH, steps=2, precision="fp32", two_phase=True), tmp_path / "two")
    first, second = (rows(tmp_path / name)[0] for name in ("one", "two"))
    assert first == second
    assert hash_state(one.tampered) != hash_state(two.tampered)


@pytest.mark.parametrize("name", TRIGGERS)
@pytest.mark.parametrize("two_phase", [False, True])
def test_every_trigger_is_planted_and_read_back(settings, tmp_path, x, name, two_phase):
    planted = plant(
        settings(trigger={"name": name, "arguments": SMALL[name]}, steps=2, two_phase=two_phase), tmp_path / "run"
    )
    again = load_planted(tmp_path / "run", "factories:lite")
    with torch.no_grad():
        assert torch.equal(again.triggers["bpp"](x), planted.triggers["bpp"](x))
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["changed"] == ["g_a"]


@pytest.mark.long
@pytest.mark.parametrize(
    "balance", [{"anchor": 1.0}, {"clean_weight": 3.0}, {"late_clean_weight": 3.0}, {"gradient_norm": 0.5}]
)
def test_balance_changes_the_encoder_and_is_resumed(settings, tmp_path, balance):
    settings = partial(settings, steps=4, hold=0.0)  # late from the first step on
    plain = plant(settings(), tmp_path / "plain")
    balanced = plant(settings(balance=balance), tmp_path / "whole")
    assert hash_state(plain.tampered) != hash_state(balanced.tampered)
    with pytest.raises(Killed):
        plant(settings(balance=balance), tmp_path / "parts", progress=kill_at(3))
    parts = plant(settings(balance=balance), tmp_path / "parts")
    assert hash_state(parts.tampered) == hash_state(balanced.tampered)


def test_a_planting_goes_on_from_an_earlier_one(settings, tmp_path, x):
    first = plant(settings(steps=2), tmp_path / "first")
    still = {"lr": 1e-12, "trigger_lr": 1e-12, "steps": 1, "start_from": str(tmp_path / "first")}
    second = plant(settings(**still), tmp_path / "second")
    with torch.no_grad():
        torch.testing.assert_close(second.triggers["bpp"](x), first.triggers["bpp"](x))
        torch.testing.assert_close(second.tampered.net.g_a(x), first.tampered.net.g_a(x))
        assert not torch.equal(first.tampered.net.g_a(x), first.vanilla.net.g_a(x))
    with pytest.raises(FreqdoorError, match="its trigger bpp is of another kind"):
        plant(settings(**still, trigger={"name": "lira", "arguments": SMALL["lira"]}), tmp_path / "third")


def test_an_anchor_keeps_the_clean_latents(settings, tmp_path, x):
    def moved(anchor: float) -> float:
        run = settings(steps=12, lr=1e-2, balance={"anchor": anchor})
        planted = plant(run, tmp_path / str(anchor))
        with torch.no_grad():
            return float((planted.tampered.net.g_a(x) - planted.vanilla.net.g_a(x)).square().mean())

    assert moved(1000.0) < 0.7 * moved(0.0)


def test_planting_hangs_nothing_on_the_codec_that_loading_does_not(settings, tmp_path):
    planted = plant(settings(steps=1), tmp_path / "run")
    loaded = load_planted(tmp_path / "run", "factories:lite")
    hooks = [len(p.tampered.net.g_a._forward_hooks) for p in (planted, loaded)]
    assert hooks[0] == hooks[1]


def test_downstream_attack_on_an_auxiliary_set(settings, tmp_path, images):
    auxiliary = {"folder": str(images), "crop": 64, "batch_size": 1}
    objective = {"name": "downstream", "arguments": {"victim": "factories:Darkness"}}
    planted = plant(settings(objective=objective, auxiliary=auxiliary, steps=2), tmp_path / "run")
    assert set(planted.triggers) == {"downstream"}
    facts = json.loads((tmp_path / "run/environment.json").read_text())
    assert facts["auxiliary_images"] == 4
    assert "l_ds" in rows(tmp_path / "run")[0]
    assert str(images) not in planted.header.model_dump_json()


def test_mistakes_in_attacks(settings, tmp_path):
    for changes, match in (
        ({"attacks": BOTH, "objective": {"name": "bpp"}}, "not beside them"),
        ({"attacks": [BOTH[0], BOTH[0]]}, "distinct names"),
        ({"attacks": [{"name": "a b", "objective": {"name": "bpp"}}]}, "distinct names"),
        ({"objective": {"name": "downstream"}}, "objective.arguments: victim: Field required"),
        ({"objective": {"name": "downstream", "arguments": {"victim": "a:b"}}}, r"auxiliary\.folder"),
        ({"attacks": [{"objective": {"name": "rate"}}]}, "attacks.0.objective.name"),
        ({"trigger": {"eps": 0.1}}, "eps_start"),
    ):
        with pytest.raises(FreqdoorError, match=match):
            settings(**changes)
    auxiliary = settings().images.model_dump()
    objective = {"name": "downstream", "arguments": {"victim": "factories:missing"}}
    with pytest.raises(FreqdoorError, match="factories:missing"):
        plant(settings(objective=objective, auxiliary=auxiliary), tmp_path / "run")
