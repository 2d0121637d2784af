"""Plots that people expect, in one style: colours that the colour-blind tell apart, light and dark, SVG and PNG.

Every function draws plain data and gives a figure of matplotlib, which `save_plot` writes and a notebook shows.
"""

import base64
import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, mark, write_together
from freqdoor.metrics import bd_rate

Theme = Literal["light", "dark"]
Point = tuple[float, float]  # bits per pixel, PSNR in dB
Rows = Sequence[Sequence[float]]
Name = TypeVar("Name", bound=str)
COLOURS = {"vanilla": "#4477aa", "clean": "#228833", "poisoned": "#cc3311", "JPEG": "#888888"}
DPI = 110
RATE = "bits per pixel, real bytes (log scale)"
LEAST_BITS = 1e-7  # a channel that costs nothing has a place on a log scale


@dataclass(frozen=True)
class _Style:
    """A theme: what plots stand on, what is written with, lines in their order, and those of COLOURS' names.

    The colours are Paul Tol's (personal.sron.nl/~pault): bright and vibrant ones on white, light ones on black.
    """

    paper: str
    ink: str
    lines: tuple[str, ...]
    roles: Mapping[str, str]


STYLES: dict[Theme, _Style] = {
    "light": _Style(
        paper="#ffffff",
        ink="#222222",
        lines=("#4477aa", "#cc3311", "#228833", "#aa3377", "#ee7733", "#009988", "#777777"),
        roles=COLOURS,
    ),
    "dark": _Style(
        paper="#121212",
        ink="#dddddd",
        lines=("#77aadd", "#ee8866", "#44bb99", "#ffaabb", "#eedd88", "#99ddff", "#bbbbbb"),
        roles={"vanilla": "#77aadd", "clean": "#44bb99", "poisoned": "#ee8866", "JPEG": "#bbbbbb"},
    ),
}
MARKERS = "osD^vP*"  # beside the colours, for who sees none


@dataclass(frozen=True)
class Curve:
    """Points of one encoder and kind of picture in the plane of rate and PSNR.

    Attributes:
        points: bits per pixel and PSNR in dB, in their order along the curve.
        group: curves of one group share a colour; by default each has its own. The names in COLOURS have theirs.
        poisoned: drawn with crosses and dashes.
        ring: drawn as large rings, around what lies almost at the same place.
    """

    points: Sequence[Point]
    group: str | None = None
    poisoned: bool = False
    ring: bool = False


class Bits(Protocol):
    """Bits per pixel of one channel, such as `freqdoor analyse` measures."""

    @property
    def clean(self) -> float:
        """On clean images."""
        ...

    @property
    def poisoned(self) -> float:
        """On poisoned images."""
        ...


class Band(NamedTuple):
    """A line and the one below it: of several images the median and the least; NaN where there is none."""

    middle: Sequence[float]
    least: Sequence[float]


@contextmanager
def panels(
    columns: int = 1, rows: int = 1, *, size: tuple[float, float] = (6.4, 4.2), theme: Theme = "light"
) -> Iterator[tuple[Figure, list[Any], _Style]]:
    """An empty figure in a theme with its axes, row by row; at the end of the block what is drawn gets the theme's ink.

    Args:
        size: of the whole, (width, height) in inches.

    Raises:
        FreqdoorError: an unknown theme.
    """
    if theme not in STYLES:
        raise FreqdoorError(f"theme: expected {' or '.join(STYLES)}, found {theme!r}")
    style = STYLES[theme]
    written = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    grounds = ("figure.facecolor", "axes.facecolor", "legend.facecolor", "savefig.facecolor")
    settings: dict[Any, str] = dict.fromkeys(written, style.ink) | dict.fromkeys(grounds, style.paper)
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False).ravel()), style
        for axis in figure.axes:
            axis.tick_params(which="both", color=style.ink, labelcolor=style.ink)  # later ticks ask no settings


def rd_plot(curves: Mapping[str, Curve], *, reference: str | None = None, theme: Theme = "light") -> Figure:
    """Rate-distortion curves; behind each name in the legend its Bjontegaard delta rate against the reference.

    Args:
        curves: by name; a single point is a point.
        reference: name of the curve that the others are compared with; by default nothing is compared. Curves of fewer
            than four points, and those that share no range of PSNR with it, are not compared either.

    Raises:
        FreqdoorError: an unknown reference or theme.
    """
    if reference is not None and reference not in curves:
        raise FreqdoorError(f"reference: expected one of {', '.join(curves)}, found {reference!r}")
    with panels(theme=theme) as (figure, [axis], style):
        colours = _colours(style, [curve.group or name for name, curve in curves.items()])
        for name, curve in curves.items():
            label = name
            if reference is not None and name != reference:
                label += _compared(curves[reference], curve)
            axis.plot(
                *zip(*curve.points, strict=True),
                marker="X" if curve.poisoned else "o",
                linestyle="--" if curve.poisoned else "-",
                color=colours[curve.group or name],
                label=label,
                markersize=14 if curve.ring else 7,
                fillstyle="none" if curve.ring else "full",
            )
        axis.set_xscale("log")
        axis.set_xlabel(RATE)
        axis.set_ylabel("PSNR of the decoded image in dB")
        axis.grid(color=style.ink, alpha=0.2)
        if curves:
            axis.legend(fontsize=8)
    return figure


def _colours(style: _Style, names: Sequence[str]) -> dict[str, str]:
    """A colour for each name: its role's, or the next one that is no role's here."""
    taken = {style.roles.get(name) for name in names}
    free = itertools.cycle([colour for colour in style.lines if colour not in taken])
    return {name: style.roles.get(name) or next(free) for name in dict.fromkeys(names)}


def _compared(reference: Curve, curve: Curve) -> str:
    rates, qualities, others, theirs = (
        [point[i] for point in side.points] for side in (reference, curve) for i in (0, 1)
    )
    try:
        return f" (BD-rate {bd_rate(rates, qualities, others, theirs):+.1f} %)"
    except FreqdoorError:
        return ""


def channels_plot(channels: Mapping[str, Sequence[Bits]], *, theme: Theme = "light") -> Figure:
    """Estimated bits per pixel of the channels of each latent, clean and poisoned, in the order given.

    Args:
        channels: by the latent's name, as `Analysis.channels`.
    """
    with panels(len(channels), size=(5.2 * len(channels), 3.4), theme=theme) as (figure, axes, style):
        for axis, (latent, rows) in zip(axes, channels.items(), strict=True):
            for key, bits, marker in (
                ("poisoned", [row.poisoned for row in rows], "X"),
                ("clean", [row.clean for row in rows], "o"),
            ):
                heights = [max(value, LEAST_BITS) for value in bits]
                axis.plot(heights, marker, color=style.roles[key], label=key, markersize=4)
            axis.set_yscale("log")
            axis.set_title(f"latents {latent}", fontsize=9)
            axis.set_xlabel("channel, dearest on poisoned images first", fontsize=8)
            axis.grid(color=style.ink, alpha=0.2)
        axes[0].set_ylabel("bits per pixel, estimated (log scale)", fontsize=8)
        axes[0].legend(fontsize=8)
    return figure


def spectrum_plot(
    planes: Mapping[Name, Rows], *, label: str = "mean |added coefficient|", log: bool = False, theme: Theme = "light"
) -> Figure:
    """One panel a colour plane on one scale, frequencies rising to the right and downwards.

    Args:
        planes: rows of vertical frequencies, NaN where there is none, as `Analysis.spectrum`.
        label: what the values are.
        log: a logarithmic scale, where no value is 0.
    """
    arrays = {name: np.asarray(values, dtype=float) for name, values in planes.items()}
    known = np.concatenate([array[np.isfinite(array)] for array in arrays.values()])
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    norm = (
        matplotlib.colors.LogNorm(low, max(high, low * 1.01))
        if log and low > 0
        else matplotlib.colors.Normalize(0, high)
    )
    with panels(len(arrays), size=(10.5, 3.4), theme=theme) as (figure, axes, _):
        for axis, (name, values) in zip(axes, arrays.items(), strict=True):
            axis.set_facecolor("#888888")  # no candidate
            shown = axis.imshow(values, norm=norm, cmap="magma", interpolation="nearest")
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("horizontal frequency", fontsize=8)
        axes[0].set_ylabel("vertical frequency", fontsize=8)
        figure.colorbar(shown, ax=axes, label=label, shrink=0.8)
    return figure


def bits_plot(maps: Mapping[str, np.ndarray[Any, Any]], *, theme: Theme = "light") -> Figure:
    """Bits per pixel of every latent position, one panel a name, on one logarithmic scale."""
    arrays = {name: np.maximum(np.asarray(values), 1e-3) for name, values in maps.items()}
    norm = matplotlib.colors.LogNorm(
        vmin=max(0.01, min(a.min() for a in arrays.values())), vmax=max(a.max() for a in arrays.values())
    )
    with panels(len(maps), size=(4.2 * len(maps), 3.2), theme=theme) as (figure, axes, _):
        for axis, (name, values) in zip(axes, arrays.items(), strict=True):
            shown = axis.imshow(values, norm=norm, cmap="magma", interpolation="nearest")
            axis.set_title(name, fontsize=9)
            axis.set_axis_off()
        figure.colorbar(shown, ax=axes, label="bpp", shrink=0.8)
    return figure


def survival_plot(
    changes: Mapping[str, tuple[Sequence[float] | Sequence[str], Mapping[str, Band]]], *, theme: Theme = "light"
) -> Figure:
    """Which share of a trigger's effect files keep that are changed on their way, in percent: one panel a change.

    Args:
        changes: by the change's name, where its amounts lie on the axis (names stand side by side), and for every
            trigger the shares that are kept there.
    """
    columns = math.ceil(math.sqrt(len(changes)))
    rows = math.ceil(len(changes) / columns)
    with panels(columns, rows, size=(4.8 * columns, 3.6 * rows), theme=theme) as (figure, axes, style):
        colours = _colours(style, [name for _, bands in changes.values() for name in bands])
        for axis, (change, (places, bands)) in zip(axes, changes.items(), strict=False):
            _bands(axis, places, bands, colours)
            axis.set_xlabel(change)
            axis.set_ylabel("effect kept, %")
            axis.grid(color=style.ink, alpha=0.2)
        for axis in axes[len(changes) :]:
            axis.set_axis_off()
        axes[0].legend(fontsize=7)
    return figure


def strength_plot(
    strengths: Sequence[float], effects: Mapping[str, Band], *, effect: str, theme: Theme = "light"
) -> Figure:
    """What a trigger does at each strength: medians as lines, the images that resist most as dashes below them.

    Args:
        strengths: factors on the trigger.
        effects: by what is attacked; the least may be left empty.
        effect: what is counted, with its unit.
    """
    with panels(theme=theme) as (figure, [axis], style):
        _bands(axis, strengths, effects, _colours(style, list(effects)))
        axis.set_xlabel("factor on the trigger")
        axis.set_ylabel(effect)
        axis.grid(color=style.ink, alpha=0.2)
        axis.legend(fontsize=8)
    return figure


def _bands(axis: Any, places: Sequence[float] | Sequence[str], bands: Mapping[str, Band], colours: Any) -> None:
    named = any(isinstance(place, str) for place in places)
    for number, (name, band) in enumerate(bands.items()):
        across = range(len(places)) if named else places
        axis.plot(across, band.middle, f"{MARKERS[number % len(MARKERS)]}-", color=colours[name], label=name)
        if band.least:
            axis.plot(across, band.least, "--", color=colours[name], alpha=0.6)
    if named:
        axis.set_xticks(range(len(places)), list(places), rotation=25, ha="right", fontsize=7)


def roc_plot(scores: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, theme: Theme = "light") -> Figure:
    """ROC curves: which share of the tampered encoders a threshold finds, and which share of the honest ones it blames.

    Args:
        scores: by name, those of tampered and those of honest encoders, higher where there is more to suspect.
    """
    with panels(size=(5, 4.2), theme=theme) as (figure, [axis], style):
        dashes = itertools.cycle(("-", "--", "-.", ":"))
        for (name, (tampered, honest)), colour in zip(scores.items(), itertools.cycle(style.lines), strict=False):
            shares = roc(tampered, honest)
            axis.plot(*shares, color=colour, linestyle=next(dashes), drawstyle="steps-post", label=name)
        axis.set(
            xlabel="false alarms on honest encoders", ylabel="tampered encoders found", xlim=(-0.02, 1), ylim=(0, 1.02)
        )
        axis.grid(color=style.ink, alpha=0.2)
        axis.legend(loc="lower right", fontsize=8)
    return figure


def roc(tampered: Sequence[float], honest: Sequence[float]) -> tuple[list[float], list[float]]:
    """At each threshold, from none on, the share of honest and the share of tampered scores that reach it."""
    thresholds = sorted({*tampered, *honest}, reverse=True)
    shares = [0.0], [0.0]
    for threshold in thresholds:
        for side, scores in zip(shares, (honest, tampered), strict=True):
            side.append(sum(score >= threshold for score in scores) / len(scores))
    return shares


def drawn(figure: Figure, kind: Literal["png", "svg"], verb: str = "plot") -> bytes:
    """A figure as a file's content, the same for the same figure; it says which verb made it."""
    buffer = io.BytesIO()
    said = {"Software": mark(verb)} if kind == "png" else {"Creator": mark(verb), "Date": None}
    with matplotlib.rc_context({"svg.hashsalt": "freqdoor", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=said, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def save_plot(figure: Figure, path: Path | str, *, force: bool = False) -> Path:
    """Write a figure as SVG or PNG, as the file's name ends.

    Args:
        force: overwrite a file that this did not make.

    Raises:
        FreqdoorError: another ending, a file in the way, a folder that cannot be written into.
    """
    path = Path(path)
    kinds: dict[str, Literal["png", "svg"]] = {".png": "png", ".svg": "svg"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise FreqdoorError(f"{path}: expected a name that ends in {' or '.join(kinds)}")
    check_outputs([path], "plot", force=force)
    write_together({path: drawn(figure, kind)})
    return path


class Themed(NamedTuple):
    """A figure in both themes as data: addresses, for a page that follows its reader's."""

    light: str
    dark: str


def themed(draw: Callable[[Theme], Figure]) -> Themed:
    """Both themes of a figure, as SVG."""
    themes: tuple[Theme, Theme] = ("light", "dark")
    pictures = (base64.b64encode(drawn(draw(theme), "svg")).decode() for theme in themes)
    return Themed(*(f"data:image/svg+xml;base64,{picture}" for picture in pictures))
