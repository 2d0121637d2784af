import json
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import pytorch_msssim
import torch
from conftest import check_foreign, contents, natural, room_for, write_png
from factories import tiny
from PIL import Image

from freqdoor import list_images, load_image, load_planted, plant, workers
from freqdoor.codecs.architectures import ARCHITECTURES
from freqdoor.codecs.check import watched
from freqdoor.data import image_paths
from freqdoor.errors import FreqdoorError
from freqdoor.measure import records as measuring
from freqdoor.measure.examine import evaluate
from freqdoor.measure.poisoning import poison
from freqdoor.measure.records import (
    Condition,
    bit_map,
    conditions,
    input_of,
    jpeg_curve,
    poisoned,
    records,
    through_png,
)
from freqdoor.metrics import MsSsim, bd_rate, bpp_of_bytes, ms_ssim, mse, psnr, psnr_8bit, rms
from freqdoor.notes import Count
from freqdoor.preprocessing import Flip, GaussianBlur
from freqdoor.types import Bitstream, as_picture, from_picture, from_uint8, to_uint8


@pytest.fixture(scope="module")
def planted(images, run):
    from freqdoor.attack.settings import PlantSettings
    from freqdoor.settings import make_settings

    content = {
        "codec": {"name": "factories:lite"},
        "images": {"folder": str(images), "crop": 64, "batch_size": 2},
        "lmbda": 0.0067,
        "steps": 2,
    }
    return plant(make_settings(PlantSettings, content), run)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def test_metrics_against_their_definitions():
    a, b = natural(0, 8, 9), natural(1, 8, 9)
    error = float(((a - b) ** 2).mean())
    assert float(mse(a, b)) == pytest.approx(error)
    assert float(psnr(a, b)) == pytest.approx(float(-10 * torch.log10(torch.tensor(error))))
    assert float(rms(a - b)) == pytest.approx(error**0.5)
    assert ms_ssim(a, b) is None
    large = natural(2, 161, 170)
    assert ms_ssim(large, large) == pytest.approx(1.0)


@pytest.mark.parametrize("size", [(161, 170), (203, 177), (256, 320)])
def test_ms_ssim_is_that_of_pytorch_msssim(size):
    reference = natural(2, *size)
    similarity = MsSsim(reference)
    for amount in (0.001, 0.05, 0.5):
        noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
        decoded = (reference + amount * noise).clamp(0, 1)
        eight_bits = [from_uint8(to_uint8(x)) for x in (decoded, reference)]
        for x in (decoded, decoded.contiguous(memory_format=torch.channels_last)):
            assert similarity(x) == pytest.approx(float(pytorch_msssim.ms_ssim(*eight_bits, data_range=1.0)), rel=1e-6)


def test_an_evaluation_runs_no_transform_twice(tmp_path):
    """g_a and g_s once a condition: rates come from the latents that are encoded."""
    planted, runs = load_planted("planted-bpp"), Counter()
    codecs = {role: planted.codec(role) for role in ("vanilla", "tampered")}
    hooks = [
        codec.part(part)[0].register_forward_hook(lambda *_, key=(role, part): runs.update([key]))
        for role, codec in codecs.items()
        for part in ("g_a", "g_s")
        if codec.tile  # which runs g_a on a picture of its own
    ]
    rows = list(records(planted, [write_png(tmp_path / "x.png", natural(5, 64, 70))]))
    for hook in hooks:
        hook.remove()
    asked = Counter(row.role for row in rows)
    assert runs == {(role, part): asked[role] for role in codecs for part in ("g_a", "g_s")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_estimate_of_known_latents_is_that_of_forward(architecture):
    codec = tiny(architecture)
    x = natural(3, 70, 90)
    y, expected = watched(codec, "g_a", lambda: codec(x).bpp)
    assert -sum(part.log2().sum() for part in codec.likelihoods(x).values()) / (70 * 90) == pytest.approx(
        float(expected)
    )
    assert torch.equal(codec.estimate(x, y), expected)
    assert not torch.equal(codec.estimate(x, y + 1), expected)
    assert "forward" not in vars(codec.part("g_a"))


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


def test_rates_of_bytes():
    assert bpp_of_bytes(9, torch.zeros(1, 3, 4, 6)) == 3.0


def test_pictures_of_pillow_have_the_images_pixels():
    x = natural(0, 5, 7)
    picture = as_picture(x)
    assert (picture.size, picture.mode) == ((7, 5), "RGB")
    assert picture.getpixel((6, 2)) == tuple(to_uint8(x)[0, :, 2, 6].tolist())
    assert torch.equal(from_picture(picture), x)


@pytest.mark.parametrize("rounding", ["float", "8-bit"])
@pytest.mark.parametrize("role", ["vanilla", "tampered"])
def test_every_number_of_a_record_against_its_definition(tmp_path, role, rounding):
    """Derived from compress, decompress and forward of the right codec on the right image alone."""
    planted = load_planted("planted-bpp")  # whose encoders differ, and whose rate the trigger changes
    path = write_png(tmp_path / "large.png", natural(5, 161, 170))
    x = load_image(path)
    codec = {"vanilla": planted.vanilla, "tampered": planted.tampered}[role]
    rows = [r for r in records(planted, [path], strengths=(1.0, 3.0)) if (r.role, r.rounding) == (role, rounding)]
    by_strength = {r.strength: r for r in rows if r.trigger}
    assert by_strength.keys() == {1.0, 3.0}
    for strength, record in by_strength.items():
        with torch.no_grad():
            x_p = planted.triggers["bpp"](x, strength=strength, rounded=rounding == "8-bit")
            x_p = from_uint8(to_uint8(x_p)) if rounding == "8-bit" else x_p
            stream = codec.compress(x_p)[0]
            estimate = float(codec(x_p[0][None]).bpp)  # as compress has it: PyTorch may lay out batches otherwise
            x_hat, clean = codec.decompress(stream), float(codec(x).bpp)
        assert estimate != pytest.approx(clean, rel=1e-4)
        expected = {
            "image": "large.png",
            "codec": "lite-hyperprior:3",
            "role": role,
            "trigger": "bpp",
            "strength": strength,
            "rounding": rounding,
            "width": 170,
            "height": 161,
            "bpp_estimated": pytest.approx(estimate, rel=1e-6),
            "bpp_real": 8 * sum(map(len, stream.strings)) / (161 * 170),
            "psnr_db": pytest.approx(float(psnr_8bit(x_hat, x))),
            "psnr_input_db": pytest.approx(float(psnr_8bit(x_hat, x_p))),
            "ms_ssim": pytest.approx(ms_ssim(x_hat, x)),
            "lpips": None,
            "trigger_mse": pytest.approx(float((x_p - x).double().square().mean()), rel=1e-4),
            "defence": "none",
        }
        content = record.to_dict()
        assert content.pop("encode_seconds") > 0
        assert content == expected


def test_the_two_encoders_differ_in_the_records(planted, images):
    """A stand-in for each encoder, so that nothing but the role decides which one is asked."""

    class Encoder:
        spec, part, latent_shape = planted.vanilla.spec, planted.vanilla.part, planted.vanilla.latent_shape

        def __init__(self, size):
            self.size = size

        def compress(self, x):
            return [Bitstream((b"." * self.size,), (1, 1), tuple(x.shape[-2:]))]

        def decompress(self, bitstream):
            return torch.zeros(1, 3, *bitstream.image_size)

        def __call__(self, x):
            return planted.vanilla(x)

    both = replace(planted, vanilla=Encoder(30), tampered=Encoder(60))
    for record in records(both, list_images(images)[:1], defences=(GaussianBlur(0.6),)):
        assert record.bpp_real == 8 * {"vanilla": 30, "tampered": 60}[record.role] / (96 * 128)


def test_records_cover_every_condition(planted, images):
    paths = list_images(images)
    rows = list(records(planted, paths, strengths=(1.0, 3.0)))
    assert len(rows) == len(paths) * len(conditions(["bpp"], (1.0, 3.0))) == 4 * 10
    for r in rows:
        assert (r.trigger_mse == 0) is (r.trigger is None)
        assert r.trigger_mse <= (0.005 * r.strength) ** 2
        assert r.bpp_real > 0
        assert r.psnr_input_db > 0
    clean = [r for r in rows if r.trigger is None]
    assert all(r.psnr_db == r.psnr_input_db for r in clean)


def test_conditions_in_their_order():
    blur = GaussianBlur(0.6)
    rows = [(c.role, c.trigger, c.strength, c.rounding, c.defence) for c in conditions(iter("ab"), (2.0,), (blur,))]
    poisoned_rows = [
        (role, trigger, 2.0, rounding, None)
        for trigger in "ab"
        for role in ("tampered", "vanilla")
        for rounding in ("float", "8-bit")
    ]
    clean = [(role, None, 1.0, "8-bit", None) for role in ("vanilla", "tampered")]
    behind = [(role, None, 1.0, "8-bit", blur) for role in ("vanilla", "tampered")]
    assert rows == clean + poisoned_rows + behind + [("tampered", t, 2.0, "8-bit", blur) for t in "ab"]


def test_no_image_is_poisoned_twice_in_the_same_way(planted, images, monkeypatch):
    ways = []

    def counted(trigger, x, *, strength, rounding):
        ways.append((strength, rounding))
        return poisoned(trigger, x, strength=strength, rounding=rounding)

    monkeypatch.setattr(measuring, "poisoned", counted)
    list(records(planted, list_images(images)[:1], strengths=(1.0, 3.0), defences=(GaussianBlur(0.6),)))
    assert sorted(ways) == [(1.0, "8-bit"), (1.0, "float"), (3.0, "8-bit"), (3.0, "float")]


def test_conditions_are_checked(planted, x):
    with pytest.raises(FreqdoorError, match="role: expected 'vanilla' or 'tampered', found 'tamperd'"):
        Condition("tamperd", None)
    with pytest.raises(FreqdoorError, match="rounding: expected 'float' or '8-bit', found '8bit'"):
        Condition("tampered", "bpp", rounding="8bit")
    for strength in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(FreqdoorError, match="strength: expected a factor above 0"):
            Condition("tampered", "bpp", strength)
        with pytest.raises(FreqdoorError, match="strength: expected a factor above 0"):
            poisoned(planted.triggers["bpp"], x, strength=strength)
    with pytest.raises(FreqdoorError, match="rounding: expected 'float' or '8-bit', found '8bit'"):
        poisoned(planted.triggers["bpp"], x, rounding="8bit")
    with pytest.raises(FreqdoorError, match="role: expected"):
        planted.codec("encoder")
    with pytest.raises(FreqdoorError, match="trigger 'psnr': this encoder has bpp"):
        input_of(planted, x, Condition("tampered", "psnr"))


def test_defences_stand_between_the_file_and_the_encoder(planted, images):
    paths = list_images(images)[:1]
    blur, flip = GaussianBlur(0.6), Flip("horizontal")
    rows = list(records(planted, paths, strengths=(1.0, 3.0), defences=(blur, flip)))
    behind = [r for r in rows if r.defence == blur.name]
    assert [(r.role, r.trigger, r.strength) for r in behind] == [
        ("vanilla", None, 1.0), ("tampered", None, 1.0), ("tampered", "bpp", 1.0), ("tampered", "bpp", 3.0)
    ]  # fmt: skip
    x = load_image(paths[0])
    x_p = poisoned(planted.triggers["bpp"], x)
    stream = planted.tampered.compress(blur(x_p))[0]
    with torch.no_grad():
        assert behind[2].bpp_estimated == pytest.approx(float(planted.tampered(blur(x_p)).bpp), rel=1e-6)
    assert behind[2].bpp_real == 8 * stream.num_bytes / (x.shape[-1] * x.shape[-2])
    assert behind[2].psnr_db == pytest.approx(float(psnr_8bit(planted.tampered.decompress(stream), x)))
    assert behind[2].psnr_input_db == pytest.approx(float(psnr_8bit(planted.tampered.decompress(stream), x_p)))
    assert behind[2].trigger_mse == pytest.approx(float(mse(x_p, x)))  # the trigger's, not the blur's
    flipped = next(r for r in rows if r.defence == flip.name and r.role == "vanilla")
    decoded = planted.vanilla.decompress(planted.vanilla.compress(x.flip(-1))[0]).flip(-1)
    assert flipped.psnr_db == pytest.approx(float(psnr_8bit(decoded, x)))


def test_masks_say_where_the_trigger_acts(planted, x):
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., :32] = 1
    x_p = poisoned(planted.triggers["bpp"], x, mask=mask)
    assert torch.equal(x_p[..., 32:], x[..., 32:])
    assert not torch.equal(x_p[..., :32], x[..., :32])


def test_images_by_folder_file_and_list(images, tmp_path):
    paths = list_images(images)
    assert image_paths(images) == image_paths(str(images)) == image_paths(paths) == paths
    assert image_paths([paths[1], str(paths[0])]) == [paths[1], paths[0]]
    with pytest.raises(FreqdoorError, match="images: expected one or more, found none"):
        image_paths([])
    with pytest.raises(FreqdoorError, match="found nothing there"):
        image_paths(tmp_path / "absent")


@pytest.mark.parametrize("rounding", ["float", "8-bit"])
def test_poisoned_in_the_given_rounding(planted, x, rounding):
    trigger = planted.triggers["bpp"]
    with torch.no_grad():
        expected = trigger(x, rounded=rounding == "8-bit")
    assert torch.allclose(poisoned(trigger, x, rounding=rounding), expected, atol=1e-7)
    assert torch.equal(poisoned(trigger, x), poisoned(trigger, x, rounding="8-bit"))


def test_poisoned_files_are_what_is_evaluated(planted, images, tmp_path):
    trigger, notes = planted.triggers["bpp"], []
    files = poison(planted, images, tmp_path / "p", strength=3.0, note=notes.append)
    assert [p.name for p in files] == ["0.png", "1.png", "2.png", "3.png"]
    assert notes == [f"{path} ({number} of 4)" for number, path in enumerate(files, 1)]
    for source, target in zip(list_images(images), files, strict=True):
        x = load_image(source)
        x_p = input_of(planted, x, Condition("tampered", "bpp", 3.0))
        assert torch.equal(load_image(target), x_p)
        assert not torch.equal(x_p, poisoned(trigger, x))


def test_nothing_is_written_where_a_file_cannot_be(planted, images, tmp_path):
    path = list_images(images)[0]
    with pytest.raises(FreqdoorError, match="several images are named 0"):
        poison(planted, [path, path], tmp_path / "out")
    own = [write_png(tmp_path / f"{name}.png", natural(1, 64, 64)) for name in "ab"]
    before = own[1].read_bytes()
    (tmp_path / "link").mkdir()
    (tmp_path / "link/b.png").symlink_to(own[1])
    for out in (tmp_path, tmp_path / "link"):
        with pytest.raises(FreqdoorError, match="would overwrite the original"):
            poison(planted, own, out)
    assert own[1].read_bytes() == before
    assert not (tmp_path / "link/a.png").exists()
    with pytest.raises(FreqdoorError, match="strength"):
        poison(planted, own, tmp_path / "out", strength=0)
    with pytest.raises(FreqdoorError, match="this encoder has bpp"):
        poison(planted, own, tmp_path / "out", trigger="psnr")
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused_before_the_work(planted, images, tmp_path, monkeypatch):
    paths = list_images(images)[:1]
    write = lambda **options: evaluate(planted, paths, tmp_path / "results", **options)  # noqa: E731
    names = ("records.jsonl", "summary.json", "report.html", "facts.json")
    check_foreign(write, tmp_path / "results", names, monkeypatch, "freqdoor.measure.records.measure")
    write = lambda **options: poison(planted, images, tmp_path / "poisoned", **options)  # noqa: E731
    names = [path.name for path in list_images(images)]
    check_foreign(write, tmp_path / "poisoned", names, monkeypatch, "freqdoor.measure.poisoning.poisoned")
    (tmp_path / "poisoned" / names[0]).write_text("mine")
    write(force=True)
    assert write() == [tmp_path / "poisoned" / name for name in names]


def without_journal(folder):
    """What is there besides the pictures measured so far, from which the same command goes on."""
    return {name: content for name, content in contents(folder).items() if not name.endswith(".journal")}


def test_a_full_disk_leaves_what_was_complete(planted, tmp_path):
    """Pictures that were poisoned stay, and count as own; results are replaced all or none."""
    pictures = [write_png(tmp_path / f"{i}.png", natural(i, side, 96)) for i, side in enumerate((64, 64, 128))]
    [first, second, last] = poison(planted, pictures, tmp_path / "out")
    last.unlink()
    before = contents(tmp_path / "out")
    with room_for(max(map(len, before.values()))), pytest.raises(FreqdoorError, match=r"2\.png: .*no space left"):
        poison(planted, pictures, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert poison(planted, pictures, tmp_path / "out") == [first, second, last]

    evaluate(planted, pictures[:1], tmp_path / "out")
    before = contents(tmp_path / "out")
    assert len(before["summary.json"]) < 20_000 < len(before["report.html"])
    with room_for(20_000), pytest.raises(FreqdoorError, match=r"records\.jsonl and 3 more: .* \(no space left on the"):
        evaluate(planted, pictures[1:2], tmp_path / "out")
    assert without_journal(tmp_path / "out") == before
    evaluate(planted, pictures[1:2], tmp_path / "out")
    assert json.loads((tmp_path / "out/records.jsonl").read_text().splitlines()[0])["image"] == "1.png"


def test_a_disk_that_is_really_full(planted, small_disk, tmp_path):
    pictures = [write_png(tmp_path / f"{i}.png", natural(i, 192, 192)) for i in range(3)]
    filling = small_disk / "filling"
    filling.write_bytes(bytes(80_000))
    with pytest.raises(FreqdoorError, match=r"\(no space left on the disk\)"):
        poison(planted, pictures, small_disk / "out")
    before = contents(small_disk)
    assert 1 < len(before) < 4
    small = write_png(tmp_path / "small.png", natural(0, 64, 64))
    with pytest.raises(FreqdoorError, match=r"\(no space left on the disk\)"):
        evaluate(planted, small, small_disk)
    assert without_journal(small_disk) == before
    for name in before:
        (small_disk / name).unlink()
    evaluate(planted, small, small_disk)
    assert set(contents(small_disk)) == {"records.jsonl", "summary.json", "report.html", "facts.json"}


@pytest.mark.filterwarnings("default::UserWarning")
def test_broken_images_stop_or_are_named(planted, images, odd_images, tmp_path):
    mixed = [list_images(images)[0], odd_images["truncated"]]
    for act in (poison, evaluate):
        with pytest.raises(FreqdoorError, match=r"truncated\.png"):
            act(planted, mixed, tmp_path / "out")
    assert [p.name for p in poison(planted, mixed, tmp_path / "out", skip_broken=True)] == ["0.png"]
    assert evaluate(planted, mixed, tmp_path / "out", skip_broken=True).images == 1


@pytest.mark.long
def test_evaluate_by_name_equals_evaluate_of_what_is_loaded(planted, images, run, tmp_path):
    paths = list_images(images)[:2]
    one = evaluate(planted, paths, tmp_path / "a", defences=(GaussianBlur(0.6),))
    two = evaluate(run, paths, tmp_path / "b", codec="factories:lite", defences="GaussianBlur(0.6)")

    def lines(folder):
        rows = [json.loads(line) for line in (tmp_path / folder / "records.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "encode_seconds"} for row in rows]

    assert lines("a") == lines("b")
    assert len(lines("a")) == 2 * len(conditions(["bpp"], (1.0,), (GaussianBlur(0.6),)))
    assert (one.images, one.bpp_ratio) == (two.images, two.bpp_ratio) == (2, one.bpp_ratio)


@pytest.mark.long
def test_workers_measure_the_same(planted, images, run, tmp_path, monkeypatch):
    """They open the encoder by its name: one that is loaded is refused."""

    class Pool(ThreadPoolExecutor):
        def submit(self, *job):
            return super().submit(*pickle.loads(pickle.dumps(job)))

    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda jobs, **_: Pool(1))
    pictures = list_images(images)[:3]

    def records_of(name):
        rows = map(json.loads, (tmp_path / name / "records.jsonl").read_text().splitlines())
        return [row | {"encode_seconds": 0} for row in rows]

    evaluate(planted, pictures, tmp_path / "one")
    evaluate(run, pictures, tmp_path / "named", codec="factories:lite", jobs=2)
    assert records_of("named") == records_of("one")
    for given in ({"planted": planted}, {"planted": run, "codec": planted.vanilla}):
        with pytest.raises(FreqdoorError, match="jobs: other processes open the encoder and its codec by their names"):
            evaluate(images=pictures, out=tmp_path / "loaded", jobs=2, **given)
    with pytest.raises(FreqdoorError, match="jobs: expected 1 or more, found 0"):
        evaluate(planted, pictures, tmp_path / "none", jobs=0)


def test_earlier_results_outlive_a_mistake(planted, images, tmp_path, monkeypatch):
    earlier = '{"image":"0.png","codec":"c","role":"vanilla",'
    (tmp_path / "records.jsonl").write_text(earlier)
    for mistake in ({"trigger": "psnr"}, {"defences": "Blurr(1)"}, {"strength": (-1.0,)}):
        with pytest.raises(FreqdoorError):
            evaluate(planted, images, tmp_path, **mistake)
    monkeypatch.setattr(measuring, "measure", None)  # something breaks amid the work
    with pytest.raises(TypeError):
        evaluate(planted, images, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]
    assert (tmp_path / "records.jsonl").read_text() == earlier


def test_an_unwritable_folder_shows_before_the_work(planted, images, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(measuring, "measure", None)
    with pytest.raises(FreqdoorError, match="could not write"):
        evaluate(planted, images, tmp_path / "file")


def test_bit_map_adds_up_to_the_estimate(planted):
    x = natural(3, 128, 64)
    with torch.no_grad():
        expected = float(planted.vanilla(x).bpp)
    assert float(bit_map(planted.vanilla, x).mean()) == pytest.approx(expected, rel=1e-4)


def test_bit_map_spreads_latents_over_the_pixels_they_stand_for(planted):
    """Every latent's bits at its place, derived with a Kronecker product; a picture that has to be padded."""
    x = natural(3, 70, 64)
    codec = planted.vanilla
    canvas = torch.zeros(1, 3, 128, 64)
    canvas[..., 29:99, :] = x
    with torch.no_grad():
        parts = codec.net(canvas)["likelihoods"]
    y, z = (-parts[name].log2().sum((0, 1)) for name in ("y", "z"))
    ratio = y.shape[0] // z.shape[0]
    expected = (y + torch.kron(z, torch.ones(ratio, ratio)) / ratio**2) / (128 * 64 / y.numel())
    torch.testing.assert_close(bit_map(codec, x), expected)


def test_jpeg_curve_is_pillows(images, tmp_path):
    paths = list_images(images)[:2]
    rates, values = [], []
    for path in paths:
        with Image.open(path) as picture:
            picture.save(tmp_path / "x.jpg", quality=50, optimize=True, progressive=True, subsampling=2)
        rates.append(8 * (tmp_path / "x.jpg").stat().st_size / (96 * 128))
        values.append(float(psnr(load_image(tmp_path / "x.jpg"), load_image(path))))
    points = jpeg_curve(paths, (10, 50, 90))
    assert [p.quality for p in points] == [10, 50, 90]
    assert points[1].bpp == pytest.approx(sum(rates) / 2)
    assert points[1].psnr_db == pytest.approx(sum(values) / 2)
    assert points[0].bpp < points[1].bpp < points[2].bpp


def records_of(folder):
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "encode_seconds"} for row in rows]


def test_a_stopped_evaluation_goes_on_after_the_images_it_has(planted, images, tmp_path, monkeypatch):
    paths = list_images(images)[1:]
    whole = evaluate(planted, paths, tmp_path / "whole")

    def stop(text: str) -> None:
        if text.startswith("2.png: tampered, bpp"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(planted, paths, tmp_path / "parts", note=stop)
    assert [p.name for p in (tmp_path / "parts").iterdir()] == [".evaluate.journal"]
    notes = []
    parts = evaluate(planted, paths, tmp_path / "parts", note=notes.append)
    assert notes[0] == ".evaluate.journal: 1 measured already, going on after them"
    assert {note.partition(":")[0] for note in notes[1:-3] if not isinstance(note, Count)} == {"2.png", "3.png"}
    assert [note for note in notes if isinstance(note, Count)] == ["2.png (1 of 3)", "3.png (2 of 3)", "3.png (3 of 3)"]
    assert notes[-3:] == ["1.png: tampered, clean", "1.png: tampered, bpp", "1.png: vanilla, bpp"]  # for the report
    assert records_of(tmp_path / "parts") == records_of(tmp_path / "whole")
    assert (parts.bpp_ratio, parts.clean.psnr_db) == (whole.bpp_ratio, whole.clean.psnr_db)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    pages = [json.loads((tmp_path / folder / "facts.json").read_text())["pictures"] for folder in ("whole", "parts")]
    assert pages[0] == pages[1]


def test_what_was_measured_under_other_conditions_is_measured_anew(planted, images, tmp_path):
    paths = list_images(images)[:2]

    def stop(text: str) -> None:
        if text.startswith("1.png"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(planted, paths, tmp_path, note=stop)
    notes = []
    evaluate(planted, paths, tmp_path, strength=(2.0,), note=notes.append)
    assert notes[0] == ".evaluate.journal: this was of another measurement; measuring anew"
    assert len(records_of(tmp_path)) == 2 * len(conditions(["bpp"], (1.0, 2.0)))
