import json
import random

import pytest
import torch

from freqdoor import load_codec, load_planted, plant
from freqdoor.codecs import hash_state
from freqdoor.loading import save_codec
from freqdoor.plant import annealed_eps, held_cosine
from freqdoor.types import FreqdoorError


class Killed(Exception):
    pass


def kill_at(step: int):
    def progress(now: int, row: dict[str, float]) -> None:
        if now == step:
            raise Killed

    return progress


def test_only_g_a_changes_and_the_export_says_that_it_is_tampered(settings, tmp_path):
    planted = plant(settings(), tmp_path / "run")
    before, after = planted.vanilla.module_hashes(), planted.tampered.module_hashes()
    assert [name for name in before if before[name] != after[name]] == ["g_a"]
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest == {"before": before, "after": after, "changed": ["g_a"]}
    whole = load_codec(str(tmp_path / "run/codec.safetensors"))
    assert whole.tampered
    assert whole.module_hashes() == after


def test_scope_g_a_and_h_a(settings, tmp_path):
    planted = plant(settings(scope="g_a+h_a"), tmp_path / "run")
    before, after = planted.vanilla.module_hashes(), planted.tampered.module_hashes()
    assert {name for name in before if before[name] != after[name]} == {"g_a", "h_a"}


@pytest.mark.parametrize("objective", ["bpp", "psnr"])
@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_planted_file_round_trip(settings, tmp_path, x, objective, preset):
    planted = plant(settings(objective={"name": objective}, preset=preset, steps=2), tmp_path / "run")
    again = load_planted(tmp_path / "run")
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


def test_a_tampered_codec_is_not_planted_in_again(settings, tmp_path, codec):
    save_codec(codec, tmp_path / "codec.safetensors", tampered=True)
    with pytest.raises(FreqdoorError, match="tampered already"):
        plant(settings(codec={"name": str(tmp_path / "codec.safetensors")}), tmp_path / "run")


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
