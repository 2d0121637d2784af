import pytest
import torch
from conftest import natural

from freqdoor import load_codec
from freqdoor.attack.plant import plant
from freqdoor.codecs.adapter import hash_state
from freqdoor.data import list_images
from freqdoor.errors import FreqdoorError
from freqdoor.measure.pgd import compare, comparison_table, pgd
from freqdoor.metrics import mse, psnr
from freqdoor.samples import BUNDLED
from freqdoor.types import round8


@pytest.mark.parametrize("goal", ["bpp", "psnr"])
def test_budget_effect_and_an_untouched_codec(goal):
    codec = load_codec(BUNDLED)  # random weights decode everything alike
    x = natural(0, 70, 90)
    before = hash_state(codec)
    codec.eval()
    wanted = [p.requires_grad for p in codec.parameters()]
    x_p = pgd(codec, x, goal, eps=0.02, steps=12)
    assert not codec.training
    assert [p.requires_grad for p in codec.parameters()] == wanted
    assert hash_state(codec) == before
    assert x_p.shape == x.shape
    assert x_p.min() >= 0
    assert x_p.max() <= 1
    rounded = round8(x_p)
    assert 0.8 * 0.02**2 < float(mse(rounded, x)) <= 0.02**2 + 1e-9
    with torch.no_grad():
        clean, attacked = codec(x), codec(rounded)
        noise = codec((x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1))
    if goal == "bpp":
        assert float(attacked.bpp) > max(float(clean.bpp), float(noise.bpp))
    else:
        assert float(psnr(attacked.x_hat, x)) < min(float(psnr(clean.x_hat, x)), float(psnr(noise.x_hat, x)))


def test_same_seed_same_image_and_global_random_numbers_untouched(codec):
    x = natural(1, 64, 64)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one = pgd(codec, x, "bpp", steps=2, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one, pgd(codec, x, "bpp", steps=2, seed=1))
    assert not torch.equal(one, pgd(codec, x, "bpp", steps=2, seed=2))


def test_comparison_has_every_attack(settings, images, tmp_path):
    planted = plant(settings(steps=1), tmp_path / "run")
    rows = list(compare(planted, list_images(images)[:2], steps=2))
    assert [row.attack for row in rows] == ["none", "bpp", "pgd-bpp", "pgd-psnr"] * 2
    assert all(row.record.trigger_mse <= 0.005**2 for row in rows)
    assert [row.codec_passes for row in rows[:4]] == [0, 0, 2, 2]
    lines = comparison_table(rows).splitlines()
    assert len(lines) == 6
    assert lines[4].startswith("| pgd-bpp | vanilla |")


def test_errors(codec, x):
    with pytest.raises(FreqdoorError, match="expected bpp or psnr"):
        pgd(codec, x, "rate")
    with pytest.raises(FreqdoorError, match="above 0"):
        pgd(codec, x, "bpp", steps=0)
