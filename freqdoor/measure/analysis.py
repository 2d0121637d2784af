"""How an attack works: the trigger's spectrum, where its bits go, and what they cost, as analysis.json and one page."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from freqdoor.attack.planted import Planted, opened
from freqdoor.attack.robust import survival_scores
from freqdoor.attack.settings import RobustSettings
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.sides import SIDE, padding
from freqdoor.data import forked, image_paths, load_image, usable_images
from freqdoor.dct import block_dct, blockify, rgb_to_ycbcr
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, marked_json, write_together
from freqdoor.lock import alone
from freqdoor.measure.records import poisoned
from freqdoor.measure.report import render
from freqdoor.notes import Count, Note
from freqdoor.plots import Theme, channels_plot, spectrum_plot, themed
from freqdoor.preprocessing import Preprocessing, parse_defences
from freqdoor.training.run import Environment, environment
from freqdoor.triggers.adaptive_dct import AdaptiveDCT
from freqdoor.triggers.base import Trigger
from freqdoor.triggers.ftrojan import FTrojan
from freqdoor.types import Images, Result

RESULT, PAGE = "analysis.json", "analysis.html"
Plane = Literal["Y", "Cb", "Cr"]
Input = Literal["clean", "poisoned"]
PLANES: tuple[Plane, ...] = ("Y", "Cb", "Cr")
INPUTS: tuple[Input, ...] = ("clean", "poisoned")
BLOCK = 16  # of the spectrum, for triggers that have no blocks of their own
BOUND = 1e-9  # CompressAI's lower bound of a likelihood: 29.9 bits, and no estimate of an element is higher
REPEATS = 3  # encodings of every image that are timed


class ChannelBits(Result):
    """Estimated bits per pixel of one latent channel, means over images."""

    channel: int
    clean: float
    poisoned: float


class Ceiling(Result):
    """Where the estimate cannot grow any more: all latent elements, and those whose likelihood is at the bound."""

    elements: int
    elements_at_bound: int
    share_of_elements: float
    bits: float
    bits_at_bound: float
    share_of_bits: float


class Sizes(Result):
    """Bytes of one image's files, estimated and real."""

    image: str
    clean_bytes_estimated: float
    poisoned_bytes_estimated: float
    clean_bytes_real: int
    poisoned_bytes_real: int


class EncodingCost(Result):
    """Medians over images of the seconds to encode, and of their ratio: denial of service by a picture."""

    clean_seconds: float
    poisoned_seconds: float
    ratio: float


class Survival(Result):
    """Survival scores of the candidate coefficients, means over images; None where nothing is injected."""

    defences: tuple[str, ...]
    block: int
    indices: tuple[int, ...]  # of the candidates in a flat block
    scores: dict[Plane, tuple[float | None, ...]]


class Analysis(Result):
    """analysis.json: how one trigger works on the tampered encoder."""

    schema_version: Literal[1] = 1
    codec: str
    trigger: str
    images: int
    eps: float
    spectrum: dict[Plane, tuple[tuple[float, ...], ...]]  # rows of vertical frequencies
    channels: dict[str, tuple[ChannelBits, ...]]  # by latent, the dearest on poisoned images first
    ceiling: dict[Input, Ceiling]
    sizes: tuple[Sizes, ...]
    encoding: EncodingCost
    survival: Survival | None = None
    environment: Environment = Environment()


class ImageAnalysis(NamedTuple):
    """What is measured on one image."""

    spectrum: Tensor | None  # (3, block, block)
    channels: dict[Input, dict[str, Tensor]]  # bits per pixel, (channels,), by input and latent
    ceiling: dict[Input, Ceiling]
    sizes: Sizes
    seconds: dict[Input, float]


@alone("analyse")
def analyse(
    planted: Planted | Path | str,
    images: Path | str | Sequence[Path],
    out: Path | str,
    *,
    trigger: str | None = None,
    codec: Codec | str | None = None,
    weights: Path | str | None = None,
    force: bool = False,
    note: Note | None = None,
) -> Analysis:
    """Analyse one trigger on the tampered encoder and write analysis.json and analysis.html into `out`.

    Poisoned images are 8-bit files; the spectrum and the survival scores are of the trigger before rounding.

    Args:
        planted: a planted encoder, or its name as for `load_planted`; `codec` and `weights` too are as there.
        images: a folder, an image, or several of both.
        trigger: which one; by default the first.
        force: overwrite files of these names that `analyse` did not make.

    Raises:
        FreqdoorError: an unknown trigger, images that cannot be used, or none with a whole block in it; a file in the
            way, or an unwritable folder.
    """
    out, encoder = Path(out), opened(planted, codec, weights)
    name, usable = encoder.named(trigger), usable_images(image_paths(images), decode=True)
    check_outputs([out / PAGE, out / RESULT], "analyse", force=force)
    chosen, tampered = encoder.triggers[name], encoder.codec("tampered")
    rows = []
    for index, path in enumerate(usable):
        if note:
            note(Count(f"{path.name}: spectrum, bits and encode time", index, len(usable)))
        rows.append(analyse_image(tampered, chosen, load_image(path), path.name))
    if note:
        note("survival scores")
    result = Analysis(
        codec=tampered.spec.name,
        trigger=name,
        images=len(rows),
        eps=chosen.eps,
        spectrum=mean_spectrum([row.spectrum for row in rows]),
        channels=mean_channels([row.channels for row in rows]),
        ceiling={key: total_ceiling([row.ceiling[key] for row in rows]) for key in INPUTS},
        sizes=tuple(row.sizes for row in rows),
        encoding=encoding_cost([row.seconds for row in rows]),
        survival=survival(chosen, usable, multiple=tampered.multiple) if isinstance(chosen, AdaptiveDCT) else None,
        environment=environment(),
    )
    text = marked_json(result.model_dump_json(indent=2), "analyse")
    write_together({out / PAGE: page(result), out / RESULT: text})
    return result


@torch.no_grad()
def analyse_image(codec: Codec, trigger: Trigger, x: Images, name: str) -> ImageAnalysis:
    """Everything that is measured on one image, (1, 3, h, w)."""
    block = trigger.block if isinstance(trigger, AdaptiveDCT | FTrojan) else BLOCK
    inputs: dict[Input, Images] = {"clean": x, "poisoned": poisoned(trigger, x)}
    pixels = x.shape[-2] * x.shape[-1]
    parts = {key: codec.likelihoods(image) for key, image in inputs.items()}
    bits = {key: channel_bits(part) for key, part in parts.items()}
    seconds, sizes = encode_in_turn(codec, inputs)
    estimated = {key: sum(float(b.sum()) for b in bits[key].values()) / 8 for key in INPUTS}
    return ImageAnalysis(
        spectrum=spectrum(poisoned(trigger, x, rounding="float") - x, block, codec.multiple),
        channels={key: {latent: b / pixels for latent, b in latents.items()} for key, latents in bits.items()},
        ceiling={key: ceiling(part) for key, part in parts.items()},
        sizes=Sizes(
            image=name,
            clean_bytes_estimated=estimated["clean"],
            poisoned_bytes_estimated=estimated["poisoned"],
            clean_bytes_real=sizes["clean"],
            poisoned_bytes_real=sizes["poisoned"],
        ),
        seconds=seconds,
    )


def whole_blocks(x: Images, block: int, multiple: int = SIDE) -> Images:
    """The part of x that consists of whole blocks of the codec's grid, whose origin is the padded image's corner."""
    height, width = x.shape[-2:]
    (left, _, top, _), _ = padding(height, width, multiple)
    y, x0 = -top % block, -left % block
    rows, columns = max(0, height - y) // block, max(0, width - x0) // block
    return x[..., y : y + rows * block, x0 : x0 + columns * block]


def spectrum(delta: Images, block: int = BLOCK, multiple: int = SIDE) -> Tensor | None:
    """Mean over blocks of |DCT(delta)| in YCbCr, (3, block, block), on the [0, 1] scale; None without a whole block."""
    whole = whole_blocks(delta, block, multiple)
    if not whole.numel():
        return None
    return block_dct(blockify(rgb_to_ycbcr(whole), block)).abs().mean(dim=(0, 2, 3))


def mean_spectrum(spectra: Sequence[Tensor | None]) -> dict[Plane, tuple[tuple[float, ...], ...]]:
    """Mean over images of the spectra, each plane as rows of vertical frequencies."""
    whole = [part for part in spectra if part is not None]
    if not whole:
        raise FreqdoorError("spectrum: no image has a whole block; give images of at least 128 pixels a side")
    planes = torch.stack(whole).mean(0).tolist()
    return {name: tuple(map(tuple, plane)) for name, plane in zip(PLANES, planes, strict=True)}


def channel_bits(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Estimated bits of every channel, -sum log2 likelihood, (channels,), in float64."""
    return {name: -part.double().log2().sum(dim=(0, 2, 3)) for name, part in parts.items()}


def mean_channels(images: Sequence[dict[Input, dict[str, Tensor]]]) -> dict[str, tuple[ChannelBits, ...]]:
    """Bits per pixel of every channel, mean over images, those that cost most on poisoned images first."""
    table = {}
    for latent in images[0]["clean"]:
        clean, after = (torch.stack([row[key][latent] for row in images]).mean(0) for key in INPUTS)
        order = after.argsort(descending=True, stable=True).tolist()
        table[latent] = tuple(ChannelBits(channel=c, clean=float(clean[c]), poisoned=float(after[c])) for c in order)
    return table


def ceiling(parts: dict[str, Tensor]) -> Ceiling:
    """How many latent elements, and how many estimated bits, are where CompressAI clamps the likelihood."""
    flat = torch.cat([part.flatten() for part in parts.values()])
    at = flat <= torch.tensor(BOUND, dtype=flat.dtype)
    bits = -flat.double().log2()
    return _ceiling(flat.numel(), int(at.sum()), float(bits.sum()), float(bits[at].sum()))


def _ceiling(elements: int, at_bound: int, bits: float, bits_at_bound: float) -> Ceiling:
    return Ceiling(
        elements=elements,
        elements_at_bound=at_bound,
        share_of_elements=at_bound / elements,
        bits=bits,
        bits_at_bound=bits_at_bound,
        share_of_bits=bits_at_bound / bits if bits else 0.0,
    )


def total_ceiling(images: Sequence[Ceiling]) -> Ceiling:
    """Over all images: elements and bits, those at the bound, and their shares."""
    return _ceiling(
        sum(c.elements for c in images),
        sum(c.elements_at_bound for c in images),
        sum(c.bits for c in images),
        sum(c.bits_at_bound for c in images),
    )


def encode_in_turn(
    codec: Codec, inputs: Mapping[Input, Images], repeats: int = REPEATS
) -> tuple[dict[Input, float], dict[Input, int]]:
    """Median seconds to encode each input, and its real bytes.

    The inputs take turns, so that whatever else the machine does falls on all of them; a first encoding is not timed.
    """
    sizes = {key: codec.compress(x)[0].num_bytes for key, x in inputs.items()}
    seconds: dict[Input, list[float]] = {key: [] for key in inputs}
    for _ in range(repeats):
        for key, x in inputs.items():
            started = time.perf_counter()
            codec.compress(x)
            seconds[key].append(time.perf_counter() - started)
    return {key: median(values) for key, values in seconds.items()}, sizes


def encoding_cost(seconds: Sequence[dict[Input, float]]) -> EncodingCost:
    """Medians over images of the seconds to encode, and of their ratio."""
    return EncodingCost(
        clean_seconds=median(row["clean"] for row in seconds),
        poisoned_seconds=median(row["poisoned"] for row in seconds),
        ratio=median(row["poisoned"] / row["clean"] for row in seconds),
    )


def survival(
    trigger: AdaptiveDCT, images: Sequence[Path], defences: Sequence[Preprocessing] | None = None, multiple: int = SIDE
) -> Survival | None:
    """Survival score of every candidate coefficient, geometric mean over images; None without a whole block.

    Scores of coefficients that robust selection has removed are None: nothing is injected there.

    Args:
        defences: by default those that robust frequency selection scores by.
        multiple: of the codec's padded sides, to whose corner the blocks are aligned.
    """
    stages = parse_defences(RobustSettings().scored_by) if defences is None else defences
    crops = [crop for path in images if (crop := whole_blocks(load_image(path), trigger.block, multiple)).numel()]
    if not crops:
        return None
    with forked():
        torch.manual_seed(0)  # noise is one of the defences
        scores = torch.stack([survival_scores(trigger, crop, stages) for crop in crops]).double()
    mean = scores.clamp_min(torch.finfo(torch.float32).tiny).log().mean(0).exp()
    alive = (trigger.survivors != 0) & mean.isfinite()
    return Survival(
        defences=tuple(stage.name for stage in stages),
        block=trigger.block,
        indices=tuple(trigger.indices),
        scores={
            plane: tuple(float(v) if keep else None for v, keep in zip(mean[c], alive[c], strict=True))
            for c, plane in enumerate(PLANES)
        },
    )


def page(result: Analysis) -> str:
    """The analysis as one self-contained HTML page."""
    survived = result.survival
    return render(
        PAGE,
        result=result,
        bpp={
            latent: {"clean": sum(row.clean for row in rows), "poisoned": sum(row.poisoned for row in rows)}
            for latent, rows in result.channels.items()
        },
        spectrum=themed(lambda theme: spectrum_plot(result.spectrum, theme=theme)),
        channels=themed(lambda theme: channels_plot(result.channels, theme=theme)),
        survival=themed(lambda theme: survivors_plot(survived, theme=theme)) if survived else None,
    )


def survivors_plot(survived: Survival, *, theme: Theme = "light") -> Figure:
    """Survival scores at the places of their coefficients in the block."""
    return spectrum_plot(survival_map(survived), label="relative change (log scale)", log=True, theme=theme)


def survival_map(survived: Survival) -> dict[Plane, tuple[tuple[float, ...], ...]]:
    """Scores at their places in the block, NaN where there is no candidate."""
    maps: dict[Plane, tuple[tuple[float, ...], ...]] = {}
    for plane, values in survived.scores.items():
        grid = np.full(survived.block**2, np.nan)
        grid[list(survived.indices)] = [np.nan if v is None else v for v in values]
        maps[plane] = tuple(map(tuple, grid.reshape(survived.block, survived.block).tolist()))
    return maps
