import json
import re
from dataclasses import replace
from types import SimpleNamespace

import factories
import numpy as np
import pytest
import torch
from conftest import check_foreign, natural, write_png
from scipy.fft import dctn
from scipy.stats import norm

from freqdoor import list_images, load_image, plant
from freqdoor.attack.robust import survival_scores
from freqdoor.attack.settings import PlantSettings
from freqdoor.codecs.adapter import hash_state
from freqdoor.dct import YCBCR, zigzag
from freqdoor.errors import FreqdoorError
from freqdoor.files import made_by
from freqdoor.measure import analysis
from freqdoor.measure.analysis import Analysis, Ceiling, ChannelBits, analyse, spectrum, survival, whole_blocks
from freqdoor.measure.records import poisoned
from freqdoor.preprocessing import GaussianBlur, Jpeg
from freqdoor.settings import make_settings
from freqdoor.triggers.adaptive_dct import AdaptiveDCT
from freqdoor.triggers.ftrojan import FTrojan


@pytest.fixture(scope="module")
def planted(images, tmp_path_factory):
    content = {
        "codec": {"name": "factories:lite"},
        "images": {"folder": str(images), "crop": 64, "batch_size": 2},
        "lmbda": 0.0067,
        "steps": 2,
        "trigger": {"arguments": {"width": 8}},
    }
    return plant(make_settings(PlantSettings, content), tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(("height", "width"), [(64, 128), (70, 90), (33, 31)])
def test_spectrum_is_of_the_whole_blocks_of_the_codecs_grid(height, width):
    delta = 0.01 * (natural(0, height, width) - natural(1, height, width))
    grid = np.full((3, 128, 128), np.nan)
    ycbcr = np.einsum("dc,chw->dhw", np.array(YCBCR), delta[0].double().numpy())
    sides = [-(-side // 64) * 64 for side in (height, width)]
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2  # the codec pads evenly
    grid[:, top : top + height, left : left + width] = ycbcr
    blocks = [grid[:, y : y + 16, x : x + 16] for y in range(0, sides[0], 16) for x in range(0, sides[1], 16)]
    whole = [np.abs(dctn(b, axes=(1, 2), norm="ortho")) for b in blocks if not np.isnan(b).any()]
    assert whole
    np.testing.assert_allclose(spectrum(delta).numpy(), np.mean(whole, axis=0), atol=1e-6)


def test_spectrum_of_the_trigger_is_where_the_trigger_writes():
    torch.manual_seed(0)
    trigger = AdaptiveDCT(width=8)
    x = 0.25 + 0.5 * natural(0, 96, 128)  # far from the clamp
    with torch.no_grad():
        found = spectrum(trigger(x) - x).flatten(1)
    middle = torch.zeros(256, dtype=torch.bool)
    middle[list(zigzag(16)[96:160])] = True
    assert ((found > 1e-4).sum(1) == 16).all()  # K coefficients a channel, all of them among the candidates
    assert float(found[:, ~middle].max()) < 1e-6
    assert spectrum(natural(0, 16, 16)) is None  # lies across four blocks of the grid


@pytest.mark.parametrize("architecture", factories.TINY_ARGUMENTS)
def test_channel_bits_add_up_to_the_estimate(architecture):
    codec = factories.tiny(architecture)
    x = natural(2, 70, 64)
    before = hash_state(codec)
    with torch.no_grad():
        expected = float(codec(x).bits)
    bits = analysis.channel_bits(codec.likelihoods(x))
    assert all(b.ndim == 1 for b in bits.values())
    assert sum(float(b.sum()) for b in bits.values()) == pytest.approx(expected, rel=1e-5)
    assert hash_state(codec) == before


def test_bits_and_ceiling_against_the_gaussian_of_every_latent(codec):
    """Likelihoods of y derived with SciPy; the latents are scaled so that the clamp of 1e-9 bites in some of them."""
    codec.eval()
    net = codec.net
    with torch.no_grad():
        net.g_a[-1].weight.mul_(30)
        x = natural(3, 128, 64)
        y = net.g_a(x)
        z = net.h_a(y)
        medians = net.entropy_bottleneck.quantiles[:, :, 1:2].reshape(1, -1, 1, 1)
        scales, means = net.h_s((z - medians).round() + medians).chunk(2, 1)
    value = np.abs((y - means).round().double().numpy())
    sigma = scales.clamp_min(0.11).double().numpy()
    expected = np.maximum(norm.cdf((0.5 - value) / sigma) - norm.cdf((-0.5 - value) / sigma), 1e-9)
    found = codec.likelihoods(x)
    bits = analysis.channel_bits(found)["y"].numpy()
    np.testing.assert_allclose(bits, -np.log2(expected).sum(axis=(0, 2, 3)), rtol=1e-3)
    clamped = int((expected <= 1e-9).sum())
    assert 0 < clamped < expected.size
    only_y = analysis.ceiling({"y": found["y"]})
    assert only_y.elements == expected.size
    assert abs(only_y.elements_at_bound - clamped) <= 2  # float32 near the bound
    assert only_y.bits_at_bound == pytest.approx(only_y.elements_at_bound * -np.log2(1e-9), rel=1e-6)
    assert only_y.bits == pytest.approx(-np.log2(expected).sum(), rel=1e-3)


def test_ceiling_by_hand():
    parts = {"y": torch.tensor([[[[0.5, 1e-9]]]]), "z": torch.tensor([[[[0.25]]], [[[2e-9]]]])}
    found = analysis.ceiling(parts)
    at = -np.log2(1e-9)
    assert (found.elements, found.elements_at_bound) == (4, 1)
    assert found.bits_at_bound == pytest.approx(at)
    assert found.bits == pytest.approx(1 + at + 2 + at - 1)
    shares = {"share_of_elements": 0.25, "share_of_bits": 0.5}
    one = Ceiling(elements=4, bits=10.0, elements_at_bound=1, bits_at_bound=5.0, **shares)
    two = Ceiling(elements=12, bits=30.0, elements_at_bound=2, bits_at_bound=25.0, **shares)
    total = analysis.total_ceiling([one, two])
    assert (total.elements, total.elements_at_bound, total.bits, total.bits_at_bound) == (16, 3, 40.0, 30.0)
    assert (total.share_of_elements, total.share_of_bits) == (3 / 16, 0.75)


def test_channels_are_sorted_by_what_they_cost_poisoned():
    def image(clean, poisoned):
        return {"clean": {"y": torch.tensor(clean)}, "poisoned": {"y": torch.tensor(poisoned)}}

    table = analysis.mean_channels([image([1.0, 2.0, 3.0], [0.0, 8.0, 2.0]), image([3.0, 2.0, 1.0], [2.0, 0.0, 6.0])])
    assert table == {
        "y": tuple(ChannelBits(channel=c, clean=2.0, poisoned=p) for c, p in ((1, 4.0), (2, 4.0), (0, 1.0)))
    }


def test_encodings_take_turns_and_the_first_is_not_timed(monkeypatch):
    now, calls = [0.0], []
    costs = {"a": iter([100.0, 1.0, 9.0, 2.0]), "b": iter([100.0, 4.0, 5.0, 60.0])}

    def compress(x):
        calls.append(x)
        now[0] += next(costs[x])
        return [SimpleNamespace(num_bytes=len(calls))]

    monkeypatch.setattr(analysis.time, "perf_counter", lambda: now[0])
    seconds, sizes = analysis.encode_in_turn(SimpleNamespace(compress=compress), {"clean": "a", "poisoned": "b"}, 3)
    assert calls == ["a", "b"] * 4
    assert seconds == {"clean": 2.0, "poisoned": 5.0}
    assert sizes == {"clean": 1, "poisoned": 2}
    rows = [{"clean": 1.0, "poisoned": p} for p in (2.0, 3.0, 100.0)]
    assert analysis.encoding_cost(rows).model_dump() == {"clean_seconds": 1.0, "poisoned_seconds": 3.0, "ratio": 3.0}


def test_survival_is_the_geometric_mean_over_images(tmp_path):
    torch.manual_seed(0)
    trigger = AdaptiveDCT(width=8)
    paths = [write_png(tmp_path / f"{i}.png", natural(i, 64, 80)) for i in range(2)]
    paths.append(write_png(tmp_path / "small.png", natural(5, 16, 16)))  # no whole block: left out
    defences = (GaussianBlur(0.6), Jpeg(50))
    found = survival(trigger, paths, defences)
    one, two = (survival_scores(trigger, whole_blocks(load_image(p), 16), defences) for p in paths[:2])
    np.testing.assert_allclose([found.scores[c] for c in ("Y", "Cb", "Cr")], (one * two).sqrt(), rtol=1e-4)
    assert found.defences == ("GaussianBlur(sigma=0.6)", "Jpeg(quality=50)")
    assert survival(trigger, paths[2:], defences) is None
    trigger.survivors[1, 5] = 0
    removed = survival(trigger, paths, defences).scores
    assert removed["Cb"][5] is None
    assert sum(v is None for values in removed.values() for v in values) == 1
    grid = np.array(analysis.survival_map(found)["Y"]).ravel()
    np.testing.assert_array_equal(grid[list(trigger.indices)], found.scores["Y"])
    assert np.isnan(np.delete(grid, list(trigger.indices))).all()


@pytest.mark.long
def test_analysis_is_a_file_and_a_page(planted, images, tmp_path):
    notes = []
    before = hash_state(planted.tampered)
    paths = list_images(images)[:2]
    result = analyse(planted, paths, tmp_path, note=notes.append)
    assert hash_state(planted.tampered) == before
    assert len(notes) == 3
    assert Analysis.read(tmp_path / "analysis.json", "") == result
    assert json.loads((tmp_path / "analysis.json").read_text())["schema_version"] == 1
    x = load_image(paths[0])
    x_p = poisoned(planted.triggers["bpp"], x)
    row = result.sizes[0]
    assert row.poisoned_bytes_real == planted.tampered.compress(x_p)[0].num_bytes
    with torch.no_grad():
        assert row.clean_bytes_estimated == pytest.approx(float(planted.tampered(x).bits) / 8, rel=1e-5)
    mean_bpp = sum(8 * r.poisoned_bytes_estimated for r in result.sizes) / (2 * 96 * 128)
    listed = sum(channel.poisoned for rows in result.channels.values() for channel in rows)
    assert listed == pytest.approx(mean_bpp)
    assert result.ceiling["poisoned"].bits == pytest.approx(2 * 96 * 128 * mean_bpp)
    assert result.encoding.ratio > 0
    assert [made_by(tmp_path / f"analysis.{ending}") for ending in ("json", "html")] == ["analyse", "analyse"]
    html = (tmp_path / "analysis.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)
    assert "://" not in html
    assert html.count("data:image/svg+xml;base64,") == 6  # three plots in two themes


def test_other_triggers_have_no_survival_scores(planted, images, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "survival_scores", None)  # would fail if it were called
    ftrojan = replace(planted, triggers={"f": FTrojan()})
    result = analyse(ftrojan, list_images(images)[:1], tmp_path)
    assert result.survival is None
    luma, cb = (np.array(result.spectrum[plane]) for plane in ("Y", "Cb"))
    assert cb.shape == (32, 32)  # its own block
    assert {tuple(map(int, divmod(i, 32))) for i in cb.ravel().argsort()[-2:]} == {(31, 31), (15, 15)}
    assert luma.max() < 0.2 * cb.max()
    assert (tmp_path / "analysis.html").read_text().count("data:image/svg+xml;base64,") == 4


def test_other_files_are_refused_before_the_work(planted, images, tmp_path, monkeypatch):
    paths = list_images(images)[:1]
    write = lambda **options: analyse(planted, paths, tmp_path / "out", **options)  # noqa: E731
    names = ("analysis.html", "analysis.json")
    check_foreign(write, tmp_path / "out", names, monkeypatch, "freqdoor.measure.analysis.analyse_image")


def test_errors(planted, images, tmp_path):
    paths = list_images(images)[:1]
    with pytest.raises(FreqdoorError, match="trigger 'x': this encoder has bpp"):
        analyse(planted, paths, tmp_path, trigger="x")
    (tmp_path / "file").write_text("")
    with pytest.raises(FreqdoorError, match="could not write"):
        analyse(planted, paths, tmp_path / "file")
    small = write_png(tmp_path / "small.png", natural(0, 16, 16))
    with pytest.raises(FreqdoorError, match="no image has a whole block"):
        analyse(planted, [small], tmp_path / "out")
