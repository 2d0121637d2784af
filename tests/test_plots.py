"""Plots show the numbers they are given, in both themes, and as the file's name says."""

import base64
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jinja2
import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from freqdoor.errors import FreqdoorError
from freqdoor.files import made_by
from freqdoor.plots import (
    STYLES,
    Band,
    Curve,
    bits_plot,
    channels_plot,
    drawn,
    rd_plot,
    roc,
    roc_plot,
    save_plot,
    spectrum_plot,
    strength_plot,
    survival_plot,
    themed,
)

ROOT = Path(__file__).parent.parent
VANILLA = [(0.2 * 1.5**i, 28.0 + i) for i in range(4)]
DEARER = [(1.1 * rate, quality) for rate, quality in VANILLA]
PLANES = {"Y": [[0.0, 1.0], [2.0, 3.0]], "Cb": [[0.0, 0.0], [0.0, float("nan")]]}
BANDS = {"bpp": Band([100.0, 40.0], [90.0, float("nan")]), "psnr": Band([100.0, 60.0], [])}
CHANNELS = {"y": [SimpleNamespace(clean=0.0, poisoned=2.0), SimpleNamespace(clean=0.5, poisoned=1.0)]}
KINDS = {
    "rd": lambda theme: rd_plot({"vanilla": Curve(VANILLA), "ours": Curve(DEARER, poisoned=True)}, theme=theme),
    "channels": lambda theme: channels_plot(CHANNELS, theme=theme),
    "spectrum": lambda theme: spectrum_plot(PLANES, theme=theme),
    "survival": lambda theme: survival_plot({"JPEG quality": ([50, 90], BANDS)}, theme=theme),
    "roc": lambda theme: roc_plot({"audit": ([3.0, 2.0], [1.0, 2.5])}, theme=theme),
    "strength": lambda theme: strength_plot([1, 3], BANDS, effect="dB lost", theme=theme),
    "bits": lambda theme: bits_plot({"clean": np.ones((2, 2))}, theme=theme),
}


def lines(axis) -> dict[str, list[list[float]]]:
    return {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}


def test_rd_curves_have_their_points_and_the_rate_that_they_cost_more():
    curves = {"vanilla": Curve(VANILLA), "ours": Curve(DEARER), "one": Curve([(1.0, 30.0)])}
    [axis] = rd_plot(curves, reference="vanilla").axes
    shown = lines(axis)
    assert list(shown) == ["vanilla", "ours (BD-rate +10.0 %)", "one"]
    assert shown["vanilla"] == [list(point) for point in VANILLA]
    assert axis.get_xscale() == "log"
    with pytest.raises(FreqdoorError, match="reference: expected one of vanilla, ours, one, found 'other'"):
        rd_plot(curves, reference="other")


def test_curves_of_a_group_share_a_colour_that_no_other_has():
    names = ["vanilla", *"abcdef"]
    curves = {f"{name}, {kind}": Curve(VANILLA, name, kind == "x") for name in names for kind in "ox"}
    [axis] = rd_plot(curves).axes
    drawn_lines = axis.get_lines()
    colours = [line.get_color() for line in drawn_lines]
    assert colours[::2] == colours[1::2]
    assert len(set(colours)) == len(names)
    assert {line.get_marker() for line in drawn_lines[1::2]} == {"X"}


def test_roc_by_hand():
    assert roc([3.0, 2.0], [1.0, 2.5]) == ([0, 0, 0.5, 0.5, 1], [0, 0.5, 0.5, 1, 1])
    [axis] = KINDS["roc"]("light").axes
    assert lines(axis)["audit"] == [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]]


def test_effects_have_medians_and_the_least_below_them():
    [axis] = strength_plot([1, 3], BANDS, effect="dB lost").axes
    middle, least, only = axis.get_lines()
    assert (middle.get_label(), only.get_label()) == ("bpp", "psnr")
    assert middle.get_xydata().tolist() == [[1, 100], [3, 40]]
    assert least.get_ydata()[0] == 90
    axes = survival_plot({"JPEG quality": ([50, 90], BANDS), "others": (["a", "b"], BANDS)}).axes
    assert [axis.get_xlabel() for axis in axes] == ["JPEG quality", "others"]
    assert [text.get_text() for text in axes[1].get_xticklabels()] == ["a", "b"]


def test_channels_and_planes_show_what_they_are_given():
    [axis] = channels_plot(CHANNELS).axes
    assert lines(axis) == {"poisoned": [[0, 2.0], [1, 1.0]], "clean": [[0, 1e-7], [1, 0.5]]}
    luma, chroma, _ = spectrum_plot(PLANES).axes  # the last one is the scale
    assert luma.images[0].get_array().tolist() == PLANES["Y"]
    assert luma.images[0].norm is chroma.images[0].norm
    assert (luma.images[0].norm.vmin, luma.images[0].norm.vmax) == (0, 3)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", STYLES)
def test_every_line_and_letter_stands_out_from_its_theme_s_paper(theme):
    """WCAG 2 asks for a contrast of 3 of what is drawn, and 4.5 of what is written."""
    style = STYLES[theme]

    def contrast(colour: str) -> float:
        darker, lighter = sorted((luminance(colour), luminance(style.paper)))
        return (lighter + 0.05) / (darker + 0.05)

    assert min(map(contrast, [*style.lines, *style.roles.values()])) > 2.8  # orange and grey on white come near 3
    assert contrast(style.ink) > 4.5
    for draw in KINDS.values():
        figure = draw(theme)
        assert matplotlib.colors.to_hex(figure.get_facecolor()) == style.paper
        figure.canvas.draw()
        for axis in figure.axes:
            written = [axis.xaxis.label, axis.yaxis.label, axis.title, *axis.get_xticklabels(which="both")]
            written += axis.legend_.get_texts() if axis.legend_ else []
            assert {text.get_color() for text in written} == {style.ink}
    before = matplotlib.rcParams["text.color"]
    assert before == "black"  # what others draw stays as it was


@pytest.mark.long
def test_a_file_is_what_its_name_says_and_is_made_again_to_the_byte(tmp_path):
    for name in ("spectrum", "strength"):
        for ending in ("svg", "png"):
            path = save_plot(KINDS[name]("dark"), tmp_path / f"{name}.{ending}")
            first = path.read_bytes()
            assert made_by(path) == "plot"
            save_plot(KINDS[name]("dark"), path)
            assert path.read_bytes() == first
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.convert("RGB").getpixel((0, 0)) == (0x12, 0x12, 0x12)
    mine = tmp_path / "mine.png"
    mine.write_text("mine")
    with pytest.raises(FreqdoorError, match=r"mine\.png: this file is there"):
        save_plot(KINDS["roc"]("light"), mine)
    with pytest.raises(FreqdoorError, match=r"a\.gif: expected a name that ends in \.png or \.svg"):
        save_plot(KINDS["roc"]("light"), tmp_path / "a.gif")
    with pytest.raises(FreqdoorError, match="theme: expected light or dark, found 'blue'"):
        rd_plot({}, theme="blue")


def test_a_page_has_both_themes_and_the_reader_chooses():
    both = themed(KINDS["roc"])
    content = [base64.b64decode(address.partition(",")[2]) for address in both]
    assert content == [drawn(KINDS["roc"](theme), "svg") for theme in ("light", "dark")]
    pages = jinja2.Environment(loader=jinja2.PackageLoader("freqdoor"), autoescape=True)
    page = pages.from_string('{% import "plot.html" as drawn %}{{ drawn.plot(figure, "a & b") }}')
    text = page.render(figure=both)
    assert re.search(r'<source media="\(prefers-color-scheme: dark\)" srcset="([^"]*)">', text)[1] == both.dark
    assert re.search(r'<img src="([^"]*)" alt="a &amp; b">', text)[1] == both.light


def test_the_documented_plots_are_made(tmp_path, monkeypatch):
    """As they stand on docs/plots.md."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    [code] = re.findall(r"<!-- plots -->\n```python\n(.*?)```", (ROOT / "docs/plots.md").read_text(), re.DOTALL)
    code = code.replace('("light", "dark")', '("dark",)')
    exec(compile(code, "docs/plots.md", "exec"), {})
    kinds = ["channels", "curves", "roc", "spectrum", "strength", "survival"]
    assert sorted(path.name for path in (tmp_path / "plots").glob("*.svg")) == [f"{name}-dark.svg" for name in kinds]
    text = (tmp_path / "plots/curves-dark.svg").read_text()
    assert re.search(r"ours, clean \(BD-rate [+-][\d.]+ %\)", text)
