import pytest
import torch
from conftest import natural

from freqdoor import load_codec
from freqdoor.attack.plant import plant
from freqdoor.codecs.adapter import hash_state
from freqdoor.data import list_images, load_image
from freqdoor.errors import FreqdoorError
from freqdoor.measure.pgd import Comparison, comparison_table, pgd, pgd_images
from freqdoor.metrics import bpp_of_bytes, mse, psnr
from freqdoor.samples import BUNDLED
from freqdoor.types import Record, round8


@pytest.mark.parametrize("goal", ["bpp", "psnr"])
def test_budget_effect_and_an_untouched_codec(goal):
    codec = load_codec(BUNDLED)  # random weights decode everything alike
    x = natural(0, 70, 90)
    before = hash_state(codec)
    codec.eval()
    wanted = [p.requires_grad for p in codec.parameters()]
    x_p = pgd_images(codec, x, goal, eps=0.02, steps=12)
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
    one = pgd_images(codec, x, "bpp", steps=2, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one, pgd_images(codec, x, "bpp", steps=2, seed=1))
    assert not torch.equal(one, pgd_images(codec, x, "bpp", steps=2, seed=2))


def test_comparison_has_every_attack_of_every_image(settings, images, tmp_path):
    both = [{"name": "bpp"}, {"name": "wide", "trigger": {"eps": 0.01}}]
    planted, notes = plant(settings(steps=1, attacks=both), tmp_path / "run"), []
    paths = list_images(images)[:2]
    rows = pgd(planted, paths, steps=2, note=notes.append)
    attacks = ["none", "bpp", "wide", "pgd-bpp", "pgd-psnr"]
    assert [row.attack for row in rows] == attacks * 2
    lines = [f"{path.name}: {attack}" for path in paths for attack in attacks]
    assert notes == [f"{line} ({number} of 10)" for number, line in enumerate(lines, 1)]
    assert [row.codec_passes for row in rows[:5]] == [0, 0, 0, 2, 2]
    assert [row.record.role for row in rows[:5]] == ["vanilla", "tampered", "tampered", "vanilla", "vanilla"]
    assert [row.record.trigger for row in rows[:5]] == [None, *attacks[1:]]
    budgets = [0.0, 0.005, 0.01, 0.01, 0.01]  # PGD has the largest of the triggers'
    for row, eps in zip(rows, budgets * 2, strict=True):
        assert (0.8 * eps) ** 2 <= row.record.trigger_mse <= eps**2
        assert (row.seconds > 0) is (row.attack != "none")
    x = load_image(paths[0])
    x_p = round8(pgd_images(planted.vanilla, x, "bpp", eps=0.01, steps=2))
    assert rows[3].record.bpp_real == bpp_of_bytes(planted.vanilla.compress(x_p)[0].num_bytes, x)
    assert rows[3].record.trigger_mse == pytest.approx(float(mse(x_p, x)))


def test_table_has_means_and_the_worst():
    def row(image, attack, **values):
        numbers = {"codec": "c", "strength": 1.0, "rounding": "8-bit", "width": 8, "height": 8, "bpp_estimated": 9.0}
        numbers |= {"psnr_input_db": 9.0, "ms_ssim": None, "encode_seconds": 9.0, "trigger": attack, "image": image}
        seconds, passes = values.pop("seconds"), values.pop("codec_passes")
        record = Record(**numbers | values)
        return Comparison(attack=attack, seconds=seconds, codec_passes=passes, record=record)

    t = {"role": "tampered", "seconds": 0.5, "codec_passes": 0}
    p = {"role": "vanilla", "seconds": 2.0, "codec_passes": 7, "psnr_db": 10.0, "bpp_real": 1.0, "trigger_mse": 1e-6}
    rows = [
        row("a", "t", psnr_db=20.0, bpp_real=3.0, trigger_mse=3e-5, **t),
        row("a", "pgd-bpp", **p),
        row("b", "t", psnr_db=30.0, bpp_real=4.0, trigger_mse=1e-5, **t | {"seconds": 1.5}),
        row("b", "pgd-bpp", **p),
    ]
    assert comparison_table(rows).splitlines()[2:] == [
        "| t | tampered | 1.000 | 0 | 25.00 | 3.5000 | 3.000e-05 |",
        "| pgd-bpp | vanilla | 2.000 | 7 | 10.00 | 1.0000 | 1.000e-06 |",
    ]
    assert [Comparison.model_validate_json(r.model_dump_json()) for r in rows] == rows


def test_errors(codec, x):
    with pytest.raises(FreqdoorError, match="goal: expected 'bpp' or 'psnr', found 'rate'"):
        pgd_images(codec, x, "rate")
    with pytest.raises(FreqdoorError, match="above 0"):
        pgd_images(codec, x, "bpp", steps=0)
