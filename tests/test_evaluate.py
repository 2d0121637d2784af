import json
import re

import pytest
import torch
from conftest import natural

from freqdoor import examine, list_images, load_image, plant, report
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import bit_map, conditions, evaluate, jpeg_curve, poison, poison_files, through_png
from freqdoor.measure.report import verdict
from freqdoor.metrics import bd_rate, ms_ssim, mse, psnr, psnr_8bit, rms
from freqdoor.preprocessing import Flip, GaussianBlur
from freqdoor.types import from_uint8, to_uint8


@pytest.fixture(scope="module")
def planted(images, tmp_path_factory):
    from freqdoor.attack.settings import PlantSettings
    from freqdoor.settings import make_settings

    content = {
        "codec": {"name": "factories:lite"},
        "images": {"folder": str(images), "crop": 64, "batch_size": 2},
        "lmbda": 0.0067,
        "steps": 2,
    }
    return plant(make_settings(PlantSettings, content), tmp_path_factory.mktemp("run"))


def test_metrics_against_their_definitions():
    a, b = natural(0, 8, 9), natural(1, 8, 9)
    error = float(((a - b) ** 2).mean())
    assert float(mse(a, b)) == pytest.approx(error)
    assert float(psnr(a, b)) == pytest.approx(float(-10 * torch.log10(torch.tensor(error))))
    assert float(rms(a - b)) == pytest.approx(error**0.5)
    assert ms_ssim(a, b) is None
    large = natural(2, 161, 170)
    assert ms_ssim(large, large) == pytest.approx(1.0)


def test_bd_rate_of_a_shifted_curve_is_the_shift():
    rates, quality = [0.1, 0.2, 0.4, 0.8], [28.0, 30.0, 32.0, 34.0]
    assert bd_rate(rates, quality, [1.1 * r for r in rates], quality) == pytest.approx(10)
    assert bd_rate(rates[::-1], quality[::-1], [0.9 * r for r in rates], quality) == pytest.approx(-10)
    with pytest.raises(FreqdoorError, match="four points a curve, found 3"):
        bd_rate(rates[:3], quality[:3], rates, quality)
    with pytest.raises(FreqdoorError, match="no range of PSNR"):
        bd_rate(rates, quality, rates, [q + 10 for q in quality])


def test_to_uint8_rounds_instead_of_cutting():
    x = torch.tensor([0.0, 0.9999, 1.0, 100.4 / 255, 100.6 / 255, -0.1, 1.1])
    assert to_uint8(x).tolist() == [0, 255, 255, 100, 101, 0, 255]
    assert torch.equal(to_uint8(from_uint8(torch.arange(256))), torch.arange(256, dtype=torch.uint8))


def test_png_in_memory_is_rounding(x):
    y = torch.rand(1, 3, 5, 7)
    assert torch.equal(through_png(y), from_uint8(to_uint8(y)))


def test_records_cover_every_condition(planted, images):
    paths = list_images(images)
    records = list(evaluate(planted, paths, strengths=(1.0, 3.0)))
    assert len(records) == len(paths) * len(conditions(["bpp"], (1.0, 3.0))) == 4 * 10
    for r in records:
        assert (r.trigger_mse == 0) is (r.trigger is None)
        assert r.trigger_mse <= (0.005 * r.strength) ** 2
        assert r.bpp_real > 0
        assert r.psnr_input_db > 0
    clean = [r for r in records if r.trigger is None]
    assert all(r.psnr_db == r.psnr_input_db for r in clean)


def test_defences_stand_between_the_file_and_the_encoder(planted, images):
    paths = list_images(images)[:1]
    blur, flip = GaussianBlur(0.6), Flip("horizontal")
    records = list(evaluate(planted, paths, strengths=(1.0, 3.0), defences=(blur, flip)))
    behind = [r for r in records if r.defence == blur.name]
    assert [(r.role, r.trigger, r.strength) for r in behind] == [
        ("vanilla", None, 1.0), ("tampered", None, 1.0), ("tampered", "bpp", 1.0), ("tampered", "bpp", 3.0)
    ]  # fmt: skip
    x = load_image(paths[0])
    x_p = poison(planted.triggers["bpp"], x)
    stream = planted.tampered.compress(blur(x_p))[0]
    assert behind[2].bpp_real == 8 * stream.num_bytes / (x.shape[-1] * x.shape[-2])
    assert behind[2].psnr_db == pytest.approx(float(psnr_8bit(planted.tampered.decompress(stream), x)))
    assert behind[2].trigger_mse == pytest.approx(float(mse(x_p, x)))  # the trigger's, not the blur's
    flipped = next(r for r in records if r.defence == flip.name and r.role == "vanilla")
    decoded = planted.vanilla.decompress(planted.vanilla.compress(x.flip(-1))[0]).flip(-1)
    assert flipped.psnr_db == pytest.approx(float(psnr_8bit(decoded, x)))


def test_sweep_has_a_row_for_every_defence_and_strength(planted, images, tmp_path):
    summary = examine(planted, list_images(images)[:1], tmp_path, strengths=(3.0,), defences=(GaussianBlur(0.6),))
    rows = [(row["defence"], row["strength"]) for row in summary["sweep"]]
    assert rows == [("none", 1.0), ("none", 3.0), ("GaussianBlur(sigma=0.6)", 1.0), ("GaussianBlur(sigma=0.6)", 3.0)]
    assert summary["sweep"][0]["clean"] == summary["clean"]
    assert "GaussianBlur(sigma=0.6)" in (tmp_path / "report.html").read_text()
    assert report(tmp_path) == summary


def test_poisoned_files_are_what_is_evaluated(planted, images, tmp_path):
    paths = list_images(images)
    written = poison_files(planted.triggers["bpp"], paths, tmp_path)
    for source, target in zip(paths, written, strict=True):
        assert torch.equal(load_image(target), poison(planted.triggers["bpp"], load_image(source)))


def test_images_of_the_same_name_do_not_overwrite_each_other(planted, images, tmp_path):
    path = list_images(images)[0]
    with pytest.raises(FreqdoorError, match="several images are named 0"):
        poison_files(planted.triggers["bpp"], [path, path], tmp_path)


def test_bit_map_adds_up_to_the_estimate(planted):
    x = natural(3, 128, 64)
    with torch.no_grad():
        expected = float(planted.vanilla(x).bpp)
    assert float(bit_map(planted.vanilla, x).mean()) == pytest.approx(expected, rel=1e-4)


def test_jpeg_curve_rises(images):
    points = jpeg_curve(list_images(images), (10, 50, 90))
    assert points[0].bpp < points[1].bpp < points[2].bpp
    assert points[0].psnr_db < points[2].psnr_db


def test_report_is_one_file_and_can_be_made_again(planted, images, tmp_path):
    summary = examine(planted, list_images(images), tmp_path)
    assert {
        "objective",
        "codec",
        "images",
        "seconds_planting",
        "trigger_psnr_db",
        "vanilla",
        "clean",
        "poisoned",
        "poisoned_8bit",
        "unchanged_modules",
        "changed_modules",
    } <= summary.keys()
    for key in ("vanilla", "clean", "poisoned", "poisoned_8bit"):
        assert {"psnr_db", "bpp_estimated", "bpp_real"} <= summary[key].keys()
    assert summary["changed_modules"] == ["g_a"]
    assert "g_s" in summary["unchanged_modules"]
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "://" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/png;base64,") == 8
    (tmp_path / "report.html").unlink()
    (tmp_path / "summary.json").unlink()
    assert report(tmp_path) == summary == json.loads((tmp_path / "summary.json").read_text())
    assert (tmp_path / "report.html").read_text() == page


def test_verdict_says_so_where_the_attack_failed_or_clean_images_suffer(planted, images, tmp_path):
    summary = examine(planted, list_images(images), tmp_path)
    good = summary | {
        "clean_cost_db": 0.1,
        "clean_cost_bpp_percent": 1.0,
        "bpp_ratio": 8.0,
        "trigger_psnr_db_worst": 46.1,
    }
    assert "treats clean images as the vanilla one does" in verdict(good)
    assert "an invisible pattern" in verdict(good)
    assert "8.0 times as large" in verdict(good)
    assert "the attack did not succeed" in verdict(good | {"bpp_ratio": 1.1})
    assert "noticeably worse on clean images" in verdict(good | {"clean_cost_db": 0.4})
    assert "but a pattern" in verdict(good | {"trigger_psnr_db_worst": 40.0})


def test_report_errors(tmp_path):
    with pytest.raises(FreqdoorError, match="expected records"):
        report(tmp_path)
    (tmp_path / "records.jsonl").write_text('{"image": 1}\n')
    with pytest.raises(FreqdoorError, match="not a file of records"):
        report(tmp_path)


def test_unknown_trigger(planted, images, tmp_path):
    with pytest.raises(FreqdoorError, match="this encoder has bpp"):
        examine(planted, list_images(images), tmp_path, trigger="psnr")
