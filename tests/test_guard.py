"""The guard: what it expects, what it stops, what it sends instead, and that anybody decodes it."""

import math
import re
import shlex
import struct
import zlib
from pathlib import Path

import pytest
import torch
from conftest import check_foreign, natural, write_png
from factories import tiny
from typer.testing import CliRunner

import freqdoor.cli as cli
from freqdoor import Guard, artificial, calibrate_guard, compress, decompress, guard_rates, load_planted
from freqdoor.cli import app
from freqdoor.codecs.container import decoded, pack, unpack
from freqdoor.data import centre, load_image, picture_in
from freqdoor.defence import guard as module
from freqdoor.defence.expectation import Expectation, GuardCalibration, Jpegs
from freqdoor.defence.guard import classical, counts
from freqdoor.defence.sources import SOURCES
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import poisoned
from freqdoor.metrics import psnr_8bit
from freqdoor.samples import KODAK, held_out
from freqdoor.types import PictureFile, to_uint8

PAGE = Path(__file__).parent.parent / "docs/guard.md"


@pytest.fixture(scope="module")
def planted():
    return {attack: load_planted(f"planted-{attack}") for attack in ("bpp", "psnr")}


@pytest.fixture(scope="module")
def photographs():
    return [centre(load_image(path), 128) for path in held_out()[:3]]


@pytest.fixture
def shots(tmp_path):
    """A folder of eight pictures for a calibration."""
    (tmp_path / "photos").mkdir()
    for i in range(8):
        write_png(tmp_path / f"photos/{i}.png", natural(i, 96, 96 + 8 * i))
    return tmp_path / "photos"


def test_an_expectation_finds_the_weights_again_and_calls_few_conspicuous():
    generator = torch.Generator().manual_seed(0)
    terms = torch.rand(400, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, generator=generator, dtype=torch.float64)
    found = (terms @ torch.tensor([2.0, 0.5], dtype=torch.float64)) * (0.1 * noise).exp()
    fit = Expectation.fitted(found.tolist(), terms.tolist(), share=0.05)
    assert fit.weights == pytest.approx((2.0, 0.5), abs=0.1)
    assert fit.deviation == pytest.approx(0.1, abs=0.02)
    beyond = [fit.excess(value, row) > fit.limit for value, row in zip(found.tolist(), terms.tolist(), strict=True)]
    assert 0.02 < sum(beyond) / len(beyond) < 0.08
    assert fit.excess(2 * fit.least, (0, 0)) == pytest.approx(math.log(2))


def test_jpegs_leave_their_headers_out():
    flat, noise = torch.full((1, 3, 64, 64), 0.5), torch.rand(1, 3, 64, 64)
    assert all(scan < 200 < len(file) for scan, file in zip(Jpegs(flat).scans, Jpegs(flat).files, strict=True))
    scans, errors = Jpegs(noise).scans, Jpegs(noise).errors
    assert scans == sorted(scans)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("attack", ["bpp", "psnr"])
def test_poisoned_images_are_stopped_and_clean_ones_pass(attack, planted, photographs):
    encoder = planted[attack]
    x_p = [poisoned(encoder.triggers[attack], x, strength=s) for x, s in zip(photographs, (1, 2, 3), strict=True)]
    rates = guard_rates(encoder.tampered, None, photographs, x_p, paired=True)
    assert rates.clean.stopped == 0
    assert rates.acted == rates.poisoned
    check = {"bpp": "rate", "psnr": "verify"}[attack]
    assert rates.poisoned.model_dump() == {"images": 3, "filtered": 3, "classical": 0, "rate": 0, "verify": 0, check: 3}
    for x, before, after in zip(x_p, rates.clean_outcomes, rates.poisoned_outcomes, strict=True):
        sent = Guard(encoder.tampered).compress(x).sent
        assert sent.num_bytes == after.bytes_sent < 1.5 * before.bytes_codec
        assert float(psnr_8bit(decoded(sent, encoder.vanilla), x)) > 25
        assert (after.bytes_codec > 5 * before.bytes_codec) == (attack == "bpp")
    # without decoding only the rate is seen
    rate_only = guard_rates(encoder.tampered, None, [], x_p, verify=False)
    assert rate_only.poisoned.stopped == (3 if attack == "bpp" else 0)
    assert all(outcome.excess_error is None for outcome in rate_only.poisoned_outcomes)


def test_what_a_trigger_does_is_told_from_pairs(photographs):
    codec = tiny("lite-hyperprior")
    calibration = GuardCalibration.read(module.SHIPPED, "it").model_copy(update={"decoder_hash": codec.decoder_hash})
    same = guard_rates(codec, calibration, photographs[:1], photographs[:1] * 2, paired=True)
    assert (same.acted.images, same.poisoned.images) == (0, 2)
    before, after = same.clean_outcomes[0], same.poisoned_outcomes[0]
    assert module.acted(before, after.model_copy(update={"excess_rate": before.excess_rate + math.log(1.26)}))
    assert not module.acted(before, after.model_copy(update={"excess_rate": before.excess_rate + math.log(1.24)}))
    assert module.acted(before, after.model_copy(update={"excess_error": before.excess_error + 0.24}))
    assert not module.acted(before, after.model_copy(update={"excess_error": before.excess_error + 0.22}))
    with pytest.raises(FreqdoorError, match="expected 2 poisoned images or a multiple of it, found 1"):
        guard_rates(codec, calibration, photographs[:2], photographs[:1], paired=True)


def test_where_no_filter_helps_a_classical_picture_is_sent(planted, photographs, monkeypatch):
    encoder, x = planted["bpp"], photographs[0]
    x_p = poisoned(encoder.triggers["bpp"], x)
    monkeypatch.setattr(module, "FILTERS", {})
    guarded = Guard(encoder.tampered).compress(x_p)
    assert isinstance(guarded.sent, PictureFile)
    assert guarded.outcome.decision == "classical"
    assert re.fullmatch(
        r"stopped: \d+\.\d times the bytes .* classical codec's file, \d+ bytes", guarded.outcome.reason
    )
    assert counts([guarded.outcome]).classical == 1
    shown = decoded(unpack(pack(guarded.sent, encoder.vanilla), encoder.vanilla), encoder.vanilla)
    assert float(psnr_8bit(shown, x_p)) > 30


def test_what_an_honest_codec_does_badly_is_no_alarm(planted):
    """Each of these costs or loses much more than JPEG lets expect, with every encoder."""
    guard = Guard(planted["bpp"].vanilla)
    outcomes = [guard.compress(artificial(source, 1)[0]).outcome for source in ("noise", "patterns", "text", "tiny")]
    assert [outcome.decision for outcome in outcomes] == ["passed"] * 4
    assert sum(bool(outcome.tried) for outcome in outcomes) >= 3


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (40, 3)])
def test_any_size_is_compressed(size, planted):
    codec = planted["bpp"].vanilla
    sent = Guard(codec).compress(natural(3, *size)).sent
    assert decoded(sent, codec).shape == (1, 3, *size)


def test_a_calibration_belongs_to_one_decoder(shots, tmp_path):
    codec = tiny("lite-hyperprior")
    with pytest.raises(FreqdoorError, match="of another decoder, that of lite-hyperprior:3; make one for this codec"):
        Guard(codec)
    calibration = calibrate_guard(codec, shots, tmp_path / "guard.json")
    assert GuardCalibration.read(tmp_path / "guard.json", "it") == calibration
    assert (tmp_path / "guard.json").stat().st_size < 4096
    with torch.no_grad():
        codec.net.g_a[0].weight.mul_(1.01)  # an encoder alone
    Guard(codec, tmp_path / "guard.json").compress(natural(1, 64, 64))
    with pytest.raises(FreqdoorError, match="expected 8 photographs or more, found 1"):
        calibrate_guard(codec, shots / "0.png")
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(FreqdoorError, match=r"no\.json: expected a guard's calibration"):
        Guard(codec, tmp_path / "no.json")


def test_other_files_are_not_overwritten(shots, tmp_path, monkeypatch):
    write = lambda **options: calibrate_guard("lite-hyperprior:3", shots, tmp_path / "out/guard.json", **options)  # noqa: E731
    check_foreign(write, tmp_path / "out", ["guard.json"], monkeypatch, "freqdoor.defence.expectation.load_codec")


def test_a_classical_picture_travels_in_the_container_and_damage_is_noticed(codec):
    x = natural(4, 40, 50)
    content = pack(classical(x), codec)
    shown = decoded(unpack(content, codec), codec)
    assert float(psnr_8bit(shown, x)) > 25
    for position in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(FreqdoorError):
            unpack(bytes(damaged), codec)
    with pytest.raises(FreqdoorError, match="another decoder than"):
        unpack(content, tiny("lite-hyperprior"))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (22, struct.pack("<2I", 50, 40), "50x40 pixels in 8-bit RGB, found 50x40|40x50"),  # turned
        (22, struct.pack("<2I", 60000, 60000), "do not belong together"),
        (30, struct.pack("<2I", 1, 1), "do not belong together"),
        (40, b"GIF89a", "could not read it"),
        (66, struct.pack("<2H", 16383, 16383), "expected a WebP or PNG picture of 50x40"),
    ],
)
def test_crafted_pictures_with_a_valid_checksum(place, value, words, codec):
    body = bytearray(pack(classical(natural(4, 40, 50)), codec)[:-4])
    assert body[52:56] == b"VP8 "
    body[place : place + len(value)] = value
    with pytest.raises(FreqdoorError, match=words):
        decoded(unpack(bytes(body) + struct.pack("<I", zlib.crc32(body)), codec), codec)


def test_long_pictures_are_sent_as_png():
    x = natural(5, 2, 17000)
    sent = classical(x)
    assert sent.content.startswith(b"\x89PNG")
    assert (to_uint8(picture_in(sent.content, (2, 17000))) == to_uint8(x)).all()


def test_compress_behind_a_guard_from_the_command_line(planted, photographs, tmp_path):
    encoder = planted["bpp"]
    image = write_png(tmp_path / "x.png", poisoned(encoder.triggers["bpp"], photographs[0]))
    result = CliRunner().invoke(
        app, ["compress", str(image), str(tmp_path / "x.fqd"), "--planted", "planted-bpp", "--guard"]
    )
    assert result.exit_code == 0, result.output
    assert "sent through Jpeg(quality=50)" in " ".join(result.output.split())
    decompress(tmp_path / "x.fqd", tmp_path / "back.png", encoder.vanilla)
    assert float(psnr_8bit(load_image(tmp_path / "back.png"), photographs[0])) > 25
    unguarded = compress(image, tmp_path / "x.fqd", encoder.tampered)
    assert unguarded.num_bytes > 5 * (tmp_path / "x.fqd").stat().st_size / 6
    with pytest.raises(FreqdoorError, match="add --guard"):
        compress(image, tmp_path / "y.fqd", encoder.tampered, calibration=tmp_path / "guard.json")


def test_pictures_of_a_source_are_the_same_every_time_and_differ_from_each_other():
    for source in SOURCES:
        first, second = artificial(source, 2), artificial(source, 2)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(*(x.flatten()[:3] for x in first)) or first[0].shape != first[1].shape
    assert not torch.equal(artificial("text", 1)[0].flatten()[:900], artificial("text", 1, seed=1)[0].flatten()[:900])


def test_the_documented_commands_work_together(shots, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / "picture.png", natural(1, 64, 64))
    [block] = re.findall(r"<!-- guard -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines():
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, (line, capsys.readouterr().err)
    assert load_image(tmp_path / "shown.png").shape == (1, 3, 64, 64)


def test_the_calibration_that_comes_along_is_of_the_bundled_codec_and_photographs():
    shipped = GuardCalibration.read(module.SHIPPED, "it")
    assert shipped.module_hashes == load_planted("planted-bpp").vanilla.module_hashes()
    assert shipped.photographs == len(list(KODAK.glob("*.png")))
