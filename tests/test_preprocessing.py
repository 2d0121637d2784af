import io
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import natural
from PIL import Image
from scipy.ndimage import median_filter, rotate

from freqdoor.errors import FreqdoorError
from freqdoor.preprocessing import (
    FILES,
    OF_SRGB,
    PREPROCESSINGS,
    PRESETS,
    RANDOM,
    ColourProfile,
    Compose,
    Crop,
    Flip,
    GaussianBlur,
    Jpeg,
    Median,
    Noise,
    Preprocessing,
    Resize,
    Rotate,
    Screenshot,
    SqueezeBits,
    WebP,
    parse_defence,
    parse_defences,
    preprocessing_name,
    random_preprocessing,
)
from freqdoor.types import from_uint8, round8, to_uint8

ONE_OF_EACH = (
    GaussianBlur(0.6),
    SqueezeBits(3),
    Jpeg(50),
    WebP(60),
    Median(),
    Noise(0.04),
    Resize(0.5),
    Screenshot(),
    ColourProfile("adobe-rgb"),
    Crop(1, 2),
    Rotate(1.0),
    Flip("vertical"),
    Compose((Flip(), GaussianBlur(0.5), Jpeg(75))),
)
STRAIGHT_THROUGH = (SqueezeBits(3), Jpeg(50), WebP(60), Median(), ColourProfile())
SIZES = ((37, 53), (5, 7))


def pixels_of(x: torch.Tensor) -> np.ndarray:
    return (x[0] * 255).round().byte().permute(1, 2, 0).numpy()


def test_the_table_below_has_one_of_each():
    assert [type(d) for d in ONE_OF_EACH] == list(PREPROCESSINGS.values())
    assert [type(d).__name__ for d in ONE_OF_EACH] == list(PREPROCESSINGS)


@pytest.mark.parametrize(("sigma", "size"), [(0.2, 5), (0.6, 5), (0.6, 3), (1.5, 7)])
def test_blur_is_a_convolution_with_a_sampled_gaussian(sigma, size):
    x = natural(0, 19, 23)
    taps = np.exp(-(np.arange(-(size // 2), size // 2 + 1) ** 2) / (2 * sigma**2))
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    margin = size // 2
    padded = np.pad(x[0].double().numpy(), ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    expected = sum(
        kernel[i, j] * padded[:, i : i + 19, j : j + 23] for i, j in itertools.product(range(size), range(size))
    )
    np.testing.assert_allclose(GaussianBlur(sigma, size)(x)[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 3, 4, 7, 8])
def test_squeeze_bits_leaves_two_to_the_depth_levels(depth):
    x = torch.rand(2, 3, 37, 53, generator=torch.Generator().manual_seed(0))
    squeezed = SqueezeBits(depth)(x).numpy()
    top = 2**depth - 1
    np.testing.assert_allclose(squeezed, np.rint(x.numpy() * np.float32(top)) / top, atol=1e-7)
    assert len(np.unique(squeezed)) == 2**depth


def test_eight_bits_are_what_a_file_holds():
    x = torch.rand(1, 3, 37, 53, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(SqueezeBits(8)(x), round8(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("defence", "suffix"), [(Jpeg(90), "jpg"), (Jpeg(50), "jpg"), (WebP(80), "webp"), (WebP(10), "webp")], ids=str
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_files_are_what_pillow_writes(tmp_path, defence, suffix, size):
    x = torch.cat([natural(0, *size), natural(1, *size)])
    for i in range(2):
        Image.fromarray(pixels_of(x[i : i + 1])).save(tmp_path / f"{i}.{suffix}", quality=defence.quality)
        with Image.open(tmp_path / f"{i}.{suffix}") as image:
            written = np.array(image)
        assert not np.array_equal(written, pixels_of(x[i : i + 1]))  # lossy
        np.testing.assert_array_equal(pixels_of(defence(x)[i : i + 1]), written)


def test_jpeg_halves_the_chroma_planes():
    x = natural(0, 37, 53)
    decoded = {}
    for subsampling in ("4:4:4", "4:2:0"):
        buffer = io.BytesIO()
        Image.fromarray(pixels_of(x)).save(buffer, "JPEG", quality=90, subsampling=subsampling)
        decoded[subsampling] = np.array(Image.open(buffer))
    ours = pixels_of(Jpeg(90)(x))
    np.testing.assert_array_equal(ours, decoded["4:2:0"])
    assert not np.array_equal(ours, decoded["4:4:4"])


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("sides", SIZES, ids=str)
def test_median_is_scipys(size, sides):
    x = natural(2, *sides)
    expected = median_filter(pixels_of(x), size=(size, size, 1), mode="nearest")
    np.testing.assert_array_equal(pixels_of(Median(size)(x)), expected)


def test_noise_has_its_deviation_and_ignores_the_global_generator():
    x = torch.full((2, 3, 64, 64), 0.5)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = Noise(0.04)(x)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(Noise(0.04)(x), first)
    assert torch.equal(Noise(0.04)(x[:1]), first[:1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(Noise(0.04, seed=1)(x), first)
    assert float((first - x).std()) == pytest.approx(0.04, rel=0.03)
    assert float((first - x).mean()) == pytest.approx(0, abs=0.001)


def test_resize_is_pillows_antialiased_resize():
    mode = Image.Resampling.BICUBIC
    x = natural(0, 37, 53)
    planes = [Image.fromarray(plane.numpy()) for plane in x[0]]  # float images: Pillow does not round them
    expected = [np.array(p.resize((26, 18), mode).resize((53, 37), mode)).clip(0, 1) for p in planes]
    np.testing.assert_allclose(Resize(0.5)(x)[0].numpy(), np.stack(expected), atol=1e-5)


def test_resize_takes_detail_away():
    stripes = (torch.arange(53) % 2).float().expand(1, 3, 37, 53)
    assert float(Resize(0.5)(stripes)[..., 8:-8].std()) < 0.1 * float(stripes.std())


def test_a_crop_moves_the_grid_and_is_moved_back():
    x = natural(0, 37, 53)
    cut = Crop(3, 5)(x)
    assert torch.equal(cut[..., :34, :48], x[..., 3:, 5:])
    assert torch.equal(cut[..., -1, :48], x[..., -1, 5:])
    assert torch.equal(cut[..., :34, -1], x[..., 3:, -1])
    back = Crop(3, 5).undo(cut)
    assert torch.equal(back[..., 3:, 5:], x[..., 3:, 5:])
    assert torch.equal(back[..., 0, 5:], x[..., 3, 5:])


def test_a_rotation_is_the_one_of_scipy_and_is_turned_back():
    """Of a blurred picture, in which bicubic and spline interpolation hardly differ."""
    x = GaussianBlur(2.0, 15)(natural(0, 61, 85))
    expected = np.stack([rotate(plane, 7, reshape=False, order=3, mode="nearest") for plane in x[0].double().numpy()])
    turned = Rotate(7.0)(x)
    inside = (slice(None), slice(12, -12), slice(12, -12))
    np.testing.assert_allclose(turned[0].numpy()[inside], expected[inside], atol=0.015)
    assert float((turned - x)[0][inside].abs().max()) > 0.05
    np.testing.assert_allclose(Rotate(7.0).undo(turned)[0].numpy()[inside], x[0].numpy()[inside], atol=0.015)


def from_chromaticities(red: tuple, green: tuple, blue: tuple, white: tuple = (0.3127, 0.3290)) -> np.ndarray:
    """XYZ of a profile's linear light, by its definition."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (red, green, blue)]).T
    x, y = white
    return columns * np.linalg.solve(columns, [x / y, 1, (1 - x - y) / y])


def test_profiles_have_the_primaries_of_their_standards():
    srgb = from_chromaticities((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
    p3 = from_chromaticities((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
    adobe = from_chromaticities((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
    np.testing.assert_allclose(OF_SRGB["display-p3"], np.linalg.solve(p3, srgb), atol=1e-4)
    np.testing.assert_allclose(OF_SRGB["adobe-rgb"], np.linalg.solve(adobe, srgb), atol=1e-4)


@pytest.mark.parametrize("profile", ["display-p3", "adobe-rgb"])
def test_a_profile_and_back_costs_what_8_bits_cost(profile):
    x = from_uint8(torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte())
    y = ColourProfile(profile)(x)
    steps = 255 * (y - x)
    assert 0 < float(steps.square().mean()) < 1  # far from what a wrong matrix or exponent gives
    grey = from_uint8(torch.arange(256).byte()).expand(1, 3, 1, 256)
    assert float((255 * (ColourProfile(profile)(grey) - grey)).abs().max()) <= 2


def test_a_screenshot_is_a_little_softer_and_has_other_tones():
    dark, light = torch.full((1, 3, 40, 40), 20 / 255), torch.full((1, 3, 40, 40), 200 / 255)
    for grey in (dark, light):
        value = float(grey[0, 0, 0, 0]) ** 2.2
        tone = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
        assert float(Screenshot()(grey)[0, 0, 20, 20]) == pytest.approx(round(255 * tone) / 255, abs=1e-6)
    assert float(Screenshot()(dark)[0, 0, 0, 0]) != float(dark[0, 0, 0, 0])
    stripes = (torch.arange(80) % 2).float().expand(1, 3, 40, 80)
    assert 0.3 < float(Screenshot(1.25)(stripes)[..., 8:-8].std() / stripes.std()) < 0.95


def test_pictures_as_files_have_all_offsets_of_a_block():
    assert {type(defence) for defence in FILES} == {Jpeg, WebP, Resize, Crop, Rotate, Screenshot, ColourProfile}
    assert [d.top for d in FILES if isinstance(d, Crop)] == list(range(1, 16))  # every offset, not those that suit
    drawn = draw(600, ["crop"], torch.Generator().manual_seed(0))
    assert {(crop.top, crop.left) for crop in drawn} <= set(itertools.product(range(16), range(16)))
    assert {crop.top for crop in drawn} == {crop.left for crop in drawn} == set(range(16))
    assert {d.profile for d in draw(40, ["profile"], torch.Generator().manual_seed(0))} == set(OF_SRGB)


@pytest.mark.parametrize(("axis", "dim"), [("horizontal", 2), ("vertical", 1)])
def test_flip_mirrors(axis, dim):
    x = natural(0, 5, 7)
    np.testing.assert_array_equal(Flip(axis)(x)[0].numpy(), np.flip(x[0].numpy(), dim))


@pytest.mark.parametrize("defence", ONE_OF_EACH, ids=str)
def test_undo_gives_the_old_orientation_and_nothing_else(defence):
    x_hat = 3 * natural(0, 5, 7) - 1  # a decoder's output, not clamped
    if isinstance(defence, Compose):
        assert torch.equal(defence.undo(x_hat), x_hat.flip(-1))
    elif isinstance(defence, Flip):
        assert torch.equal(defence.undo(x_hat.flip(-2)), x_hat)
    elif isinstance(defence, Crop | Rotate):
        assert not torch.equal(defence.undo(x_hat), x_hat)
        assert defence.undo(x_hat).shape == x_hat.shape
    else:
        assert defence.undo(x_hat) is x_hat


def test_compose_goes_forwards_and_is_undone_backwards():
    class Rolled(Flip):
        def _apply(self, x):
            return x.roll(1, -1)

        def undo(self, x_hat):
            return x_hat.roll(-1, -1)

    x = natural(0, 5, 7)
    both = Compose([Rolled(), Flip()])  # the two do not commute
    assert torch.equal(both(x), x.roll(1, -1).flip(-1))
    assert not torch.equal(both(x), x.flip(-1).roll(1, -1))
    assert torch.equal(both.undo(both(x)), x)


@pytest.mark.parametrize("defence", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_defence_keeps_size_range_and_a_gradient(defence, size):
    extremes = torch.randint(0, 2, (1, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    x = torch.cat([natural(0, *size), extremes]).requires_grad_()
    kept = x.detach().clone()
    y = defence(x)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert y.device == x.device
    assert float(y.detach().min()) >= 0
    assert float(y.detach().max()) <= 1
    assert torch.equal(x.detach(), kept)
    weight = torch.rand(y.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    assert bool(gradient.isfinite().all())
    # a filter whose taps sum to 1 hands the whole gradient on, wherever it goes
    torch.testing.assert_close(gradient.sum(dim=(2, 3)), weight.sum(dim=(2, 3)), rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(defence(x), y.detach())
        assert not torch.equal(y.detach(), kept)


@pytest.mark.parametrize("defence", STRAIGHT_THROUGH, ids=str)
def test_straight_through_gradient_is_the_identity(defence):
    x = natural(0, 5, 7).requires_grad_()
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((defence(x) * weight).sum(), x)
    assert torch.equal(gradient, weight)


@pytest.mark.parametrize("defence", [Jpeg(5), WebP(5), Median(7)], ids=str)
def test_what_was_8_bits_is_8_bits_to_the_last_bit(defence):
    x = torch.rand(1, 3, 37, 53, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = defence(x).detach()
    assert torch.equal(y, from_uint8(to_uint8(y)))


@pytest.mark.parametrize("defence", [GaussianBlur(0.6), Resize(0.5), Flip(), Noise(0.01)], ids=str)
def test_differentiable_defences_have_their_own_gradient(defence):
    x = (0.3 + 0.4 * natural(0, 5, 7)).requires_grad_()  # away from the clamp
    generator = torch.Generator().manual_seed(1)
    weight, step = torch.rand(x.shape, generator=generator), torch.randn(x.shape, generator=generator)
    (gradient,) = torch.autograd.grad((defence(x) * weight).sum(), x)
    with torch.no_grad():
        change = ((defence(x + 0.01 * step) - defence(x - 0.01 * step)) * weight).sum() / 0.02
    assert float((gradient * step).sum()) == pytest.approx(float(change), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("defence", [GaussianBlur(0.5), Resize(0.75)], ids=str)
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_black_and_white_areas_have_a_gradient(defence, level):
    x = torch.full((1, 3, 16, 16), level, requires_grad=True)
    (gradient,) = torch.autograd.grad(defence(x).sum(), x)
    assert float(gradient.sum()) == pytest.approx(x.numel(), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("defence", ONE_OF_EACH, ids=str)
def test_the_device_is_kept(defence):
    x = natural(0, 37, 53)
    y = defence(x.cuda())
    assert y.is_cuda
    assert float((y.cpu() - defence(x)).abs().mean()) < 1e-4


def test_too_small_and_too_large_images_are_refused():
    with pytest.raises(FreqdoorError, match="at least 3 pixels, found 2 x 9"):
        GaussianBlur(0.5)(torch.zeros(1, 3, 2, 9))
    for change in (Crop(3, 5), Crop(3, 5).undo):
        with pytest.raises(FreqdoorError, match="at least 6 pixels, found 5 x 9"):
            change(torch.zeros(1, 3, 5, 9))
    with pytest.raises(FreqdoorError, match="at most 16383 pixels, found 1 x 16384"):
        WebP(80)(torch.zeros(1, 3, 1, 16384))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: GaussianBlur(0), "^GaussianBlur: sigma: Input should be greater than or equal to 0.01, found 0;"),
        (lambda: GaussianBlur(math.nan), "found nan"),
        (lambda: GaussianBlur(True), "found True"),
        (lambda: GaussianBlur(0.5, 4), "size: expected an odd number, found 4"),
        (lambda: SqueezeBits(9), "depth: .* less than or equal to 8, found 9"),
        (lambda: SqueezeBits(3.0), "found 3.0"),
        (lambda: Jpeg(0), "^Jpeg: quality: .* equal to 1, found 0"),
        (lambda: WebP("80"), "^WebP: quality: .* valid integer, found '80'"),
        (lambda: Median(2), "odd number"),
        (lambda: Median(17), "less than or equal to 15"),
        (lambda: GaussianBlur(0, 4), "sigma: .*; size: .*; expected GaussianBlur.sigma, size=5.$"),
        (lambda: GaussianBlur(100.5), "less than or equal to 100"),
        (lambda: GaussianBlur(0.5, 1), "greater than or equal to 3"),
        (lambda: GaussianBlur(0.5, 101), "less than or equal to 99"),
        (lambda: SqueezeBits(0), "greater than or equal to 1"),
        (lambda: Jpeg(101), "less than or equal to 100"),
        (lambda: Noise(1.5), "less than or equal to 1"),
        (lambda: Resize(0.001), "greater than or equal to 0.01"),
        (lambda: Noise(-0.1), "sigma"),
        (lambda: Noise(0.1, seed=-1), "seed"),
        (lambda: Resize(1.5), "factor"),
        (lambda: Crop(-1, 0), "top"),
        (lambda: Crop(0, 64), "left"),
        (lambda: Rotate(90), "less than or equal to 45"),
        (lambda: Screenshot(1.0), "zoom"),
        (lambda: ColourProfile("srgb"), "'display-p3' or 'adobe-rgb', found 'srgb'"),
        (lambda: Flip("diagonal"), "'horizontal' or 'vertical', found 'diagonal'"),
        (lambda: Compose(()), "defences"),
        (lambda: Compose(Jpeg(75)), "a tuple of one defence or more"),
        (lambda: Compose((Jpeg(75), "Flip")), "a tuple of one defence or more"),
    ],
)
def test_wrong_arguments_are_refused(make, found):
    with pytest.raises(FreqdoorError, match=found):
        make()


@pytest.mark.parametrize(
    ("defence", "name"),
    [
        (GaussianBlur(0.5), "GaussianBlur(sigma=0.5)"),
        (GaussianBlur(1, 7), "GaussianBlur(sigma=1.0, size=7)"),
        (Median(), "Median()"),
        (Noise(0.01, seed=3), "Noise(sigma=0.01, seed=3)"),
        (Flip("vertical"), "Flip(axis='vertical')"),
        (Compose((Flip(), Jpeg(75))), "Compose(Flip(), Jpeg(quality=75))"),
    ],
)
def test_names(defence, name):
    assert defence.name == str(defence) == preprocessing_name(defence) == name
    assert preprocessing_name(None) == "none"


@pytest.mark.parametrize(
    "defence", dict.fromkeys((*ONE_OF_EACH, *PRESETS["all"], *FILES, GaussianBlur(0.1 + 0.2, 7))), ids=str
)
def test_names_are_read_back(defence):
    assert parse_defence(defence.name) == defence


def test_forms_that_are_read():
    assert parse_defence(" Jpeg( 75 ) ") == Jpeg(75)
    assert parse_defence("Median") == Median(3)
    assert parse_defence("Compose(Flip, Compose(Jpeg(75)))") == Compose((Flip(), Compose((Jpeg(75),))))
    three = (Jpeg(75), GaussianBlur(0.5, 3), Flip())
    assert parse_defences("Jpeg(75); GaussianBlur(0.5, 3);\n Flip;") == three
    assert parse_defences("Jpeg(75), GaussianBlur(0.5, 3), Flip()") == three
    assert parse_defences("Compose(Flip(), Jpeg(75)), Flip") == (Compose((Flip(), Jpeg(75))), Flip())
    assert parse_defences("Jpeg(75)") == (Jpeg(75),)
    assert parse_defences("Jpeg(75); Jpeg(quality=75)") == (Jpeg(75),)
    assert parse_defences("paper; Jpeg(75), SqueezeBits(3)") == (*PRESETS["paper"], Jpeg(75))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Blur(0.5)", "'Blur\\(0.5\\)': expected one of GaussianBlur, SqueezeBits"),
        ("jpeg(75)", "expected one of"),
        ("", "expected a form like"),
        ("Jpeg(75", "expected a form like"),
        ("75", "expected a form like"),
        ("Jpeg(75).name", "expected a form like"),
        ("freqdoor.Jpeg(75)", "expected a form like"),
        ("Jpeg(75)(1)", "expected a form like"),
        ("Jpeg(75) + Flip()", "expected a form like"),
        ("Jpeg\0(75)", "expected a form like"),
        ("(" * 500 + "Jpeg(75)" + ")" * 500, "expected a form like"),
        ("Jpeg()", "quality: Field required; expected Jpeg\\(quality\\)$"),
        ("Jpeg(75, 80)", "argument 2: Unexpected positional argument, found 80"),
        ("Jpeg(75, q=75)", "q: Unexpected keyword argument"),
        ("Jpeg(75, quality=80)", "quality: Got multiple values"),
        ("Jpeg(quality=75, quality=80)", "every argument is given once"),
        ("Jpeg(**{'quality': 75})", "every argument is given once"),
        ("Jpeg(*[75])", "plain numbers"),
        ("Jpeg(quality=__import__('os').getpid())", "plain numbers"),
        ("Jpeg(exit)", "plain numbers"),
        ("Jpeg(500)", "quality: .* equal to 100, found 500"),
        ("Flip('sideways')", "'horizontal' or 'vertical'"),
        ("Flip([1])", "'horizontal' or 'vertical'"),
        ("GaussianBlur(1e999)", "found inf"),
        ("Compose()", "one defence or more"),
        ("Compose(75)", "expected a form like"),
        ("Compose(defences=[1])", "one defence or more"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_sentence(text, found):
    with pytest.raises(FreqdoorError, match=found):
        parse_defence(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" ; ", "none, paper, all, files or a list"),
        ("papers", "in a list, none, paper, all, files"),
        ("paper; Jpeg", "quality"),
    ],
)
def test_lists_that_cannot_be_read(text, found):
    with pytest.raises(FreqdoorError, match=found):
        parse_defences(text)


def test_presets():
    blur, bits = (0.2, 0.3, 0.5, 0.6), (7, 4, 3)
    assert parse_defences("paper") == (*(GaussianBlur(s, 5) for s in blur), *(SqueezeBits(d) for d in bits))
    beyond = "Jpeg(90), Jpeg(75), Jpeg(50), WebP(80), Median(3), Noise(0.01), Noise(0.04), Resize(0.5)"
    flips = "Flip('horizontal'), Flip('vertical')"
    assert parse_defences("all") == parse_defences(f"paper; {beyond}; {flips}")
    assert len(PRESETS["all"]) == 17
    assert parse_defences("none") == ()


def draw(count: int, kinds=tuple(RANDOM), generator=None) -> list[Preprocessing | None]:
    return [random_preprocessing(kinds, generator) for _ in range(count)]


def test_random_defences_are_reproducible():
    torch.manual_seed(5)
    first = draw(20)
    torch.manual_seed(5)
    assert draw(20) == first
    assert draw(20) != first
    with torch.random.fork_rng():
        before = torch.random.get_rng_state()
        own = draw(20, generator=torch.Generator().manual_seed(5))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert own == first
    # the stream goes on alike whatever was drawn
    states = []
    for kind in RANDOM:
        generator = torch.Generator().manual_seed(5)
        draw(1, [kind], generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize(
    ("kind", "cls", "field", "low", "high"),
    [
        ("blur", GaussianBlur, "sigma", 0.3, 0.8),
        ("noise", Noise, "sigma", 0.005, 0.05),
        ("jpeg", Jpeg, "quality", 40, 95),
        ("bits", SqueezeBits, "depth", 3, 7),
        ("resize", Resize, "factor", 0.5, 0.95),
        ("round8", SqueezeBits, "depth", 8, 8),
        ("webp", WebP, "quality", 60, 95),
        ("rotate", Rotate, "degrees", -1.0, 1.0),
        ("screenshot", Screenshot, "zoom", 1.1, 2.0),
    ],
)
def test_random_strengths_fill_their_range(kind, cls, field, low, high):
    drawn = draw(300, [kind], torch.Generator().manual_seed(0))
    assert {type(d) for d in drawn} == {cls}
    values = [getattr(d, field) for d in drawn]
    assert low <= min(values) <= low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) <= max(values) <= high
    assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.1 * (high - low) + 1e-9)
    if kind == "noise":
        assert len({d.seed for d in drawn}) == 300  # every step its own noise


def test_random_crops_are_at_all_offsets():
    drawn = draw(2000, ["crop"], torch.Generator().manual_seed(0))
    assert {(d.top, d.left) for d in drawn} == set(itertools.product(range(16), range(16)))


def test_random_kinds_are_as_likely():
    drawn = draw(600, ["none", "blur", "jpeg"], torch.Generator().manual_seed(0))
    counts = [sum(type(d) is cls for d in drawn) for cls in (type(None), GaussianBlur, Jpeg)]
    assert sum(counts) == 600
    assert min(counts) > 150


@pytest.mark.parametrize(("kinds", "found"), [((), "found none"), (("blur", "fog"), r"found \['fog'\]")])
def test_unknown_kinds_are_refused(kinds, found):
    with pytest.raises(FreqdoorError, match=found):
        random_preprocessing(kinds)
