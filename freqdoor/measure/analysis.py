"""How an attack works: the trigger's spectrum, where its bits go, and what they cost, as analysis.json and one page."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from compressai.ops import compute_padding
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure
from torch import Tensor

from freqdoor.attack.planted import Planted
from freqdoor.attack.robust import survival_scores
from freqdoor.attack.settings import RobustSettings
from freqdoor.codecs.adapter import STRIDE, Codec
from freqdoor.data import load_image, usable_images
from freqdoor.dct import block_dct, blockify, rgb_to_ycbcr
from freqdoor.errors import FreqdoorError
from freqdoor.files import write_text
from freqdoor.measure.records import Note, poison
from freqdoor.measure.report import COLOURS, data_address
from freqdoor.preprocessing import Preprocessing, parse_defences
from freqdoor.training.run import environment
from freqdoor.triggers.adaptive_dct import AdaptiveDCT
from freqdoor.triggers.base import Trigger
from freqdoor.triggers.ftrojan import FTrojan
from freqdoor.types import Images

RESULT, PAGE = "analysis.json", "analysis.html"
PLANES = ("Y", "Cb", "Cr")
INPUTS = ("clean", "poisoned")
BLOCK = 16  # of the spectrum, for triggers that have no blocks of their own
BOUND = 1e-9  # CompressAI's lower bound of a likelihood: 29.9 bits, and no estimate of an element is higher
REPEATS = 3  # encodings of every image that are timed


@dataclass(frozen=True)
class Ceiling:
    """Where the estimate cannot grow any more: all latent elements, and those whose likelihood is at the bound."""

    elements: int
    bits: float
    elements_at_bound: int
    bits_at_bound: float


def analyse(
    planted: Planted, images: Sequence[Path], out: Path | str, *, trigger: str | None = None, note: Note | None = None
) -> dict[str, Any]:
    """Analyse one trigger on the tampered encoder and write analysis.json and analysis.html into `out`.

    Poisoned images are 8-bit files; the spectrum and the survival scores are of the trigger before rounding.

    Args:
        trigger: which one; by default the first.

    Returns:
        The content of analysis.json.

    Raises:
        FreqdoorError: an unknown trigger, images that cannot be used, or none with a whole block in it.
    """
    out, usable = Path(out), usable_images(images, decode=True)
    name = planted.named(trigger)
    write_text(out / RESULT, "{}")  # an unwritable folder shows before the work, not after it
    chosen, codec = planted.triggers[name], planted.tampered
    rows = []
    for path in usable:
        if note:
            note(f"{path.name}: spectrum, bits and encode time")
        rows.append(analyse_image(codec, chosen, load_image(path), path.name))
    if note:
        note("survival scores")
    result = {
        "codec": codec.spec.name,
        "trigger": name,
        "images": len(rows),
        "eps": chosen.eps,
        "spectrum": mean_spectrum([row["spectrum"] for row in rows]),
        "channels": mean_channels([row["channels"] for row in rows]),
        "ceiling": {given: total_ceiling([row["ceiling"][given] for row in rows]) for given in INPUTS},
        "sizes": [row["sizes"] for row in rows],
        "encoding": encoding_cost([row["seconds"] for row in rows]),
        "survival": survival(chosen, usable) if isinstance(chosen, AdaptiveDCT) else None,
        "environment": environment(),
    }
    write_text(out / RESULT, json.dumps(result, indent=2, allow_nan=False))
    write_text(out / PAGE, page(result))
    return result


@torch.no_grad()
def analyse_image(codec: Codec, trigger: Trigger, x: Images, name: str) -> dict[str, Any]:
    """Everything that is measured on one image, (1, 3, h, w)."""
    block = trigger.block if isinstance(trigger, AdaptiveDCT | FTrojan) else BLOCK
    inputs = dict(zip(INPUTS, (x, poison(trigger, x)), strict=True))
    pixels = x.shape[-2] * x.shape[-1]
    parts = {given: likelihoods(codec, image) for given, image in inputs.items()}
    bits = {given: channel_bits(part) for given, part in parts.items()}
    seconds, sizes = encode_in_turn(codec, inputs)
    return {
        "spectrum": spectrum(poison(trigger, x, rounding="float") - x, block),
        "channels": {given: {key: b / pixels for key, b in latents.items()} for given, latents in bits.items()},
        "ceiling": {given: ceiling(part) for given, part in parts.items()},
        "sizes": {
            "image": name,
            **{f"{given}_bytes_estimated": sum(float(b.sum()) for b in bits[given].values()) / 8 for given in INPUTS},
            **{f"{given}_bytes_real": sizes[given] for given in INPUTS},
        },
        "seconds": seconds,
    }


def whole_blocks(x: Images, block: int) -> Images:
    """The part of x that consists of whole blocks of the codec's grid, whose origin is the padded image's corner."""
    height, width = x.shape[-2:]
    (left, _, top, _), _ = compute_padding(height, width, min_div=STRIDE)
    y, x0 = -top % block, -left % block
    rows, columns = max(0, height - y) // block, max(0, width - x0) // block
    return x[..., y : y + rows * block, x0 : x0 + columns * block]


def spectrum(delta: Images, block: int = BLOCK) -> Tensor | None:
    """Mean over blocks of |DCT(delta)| in YCbCr, (3, block, block), on the [0, 1] scale; None without a whole block."""
    whole = whole_blocks(delta, block)
    if not whole.numel():
        return None
    return block_dct(blockify(rgb_to_ycbcr(whole), block)).abs().mean(dim=(0, 2, 3))


def mean_spectrum(spectra: Sequence[Tensor | None]) -> dict[str, list[list[float]]]:
    """Mean over images of the spectra, each plane as rows of vertical frequencies."""
    found = [s for s in spectra if s is not None]
    if not found:
        raise FreqdoorError("spectrum: no image has a whole block; give images of at least 128 pixels a side")
    return dict(zip(PLANES, torch.stack(found).mean(0).tolist(), strict=True))


@torch.no_grad()
def likelihoods(codec: Codec, x: Images) -> dict[str, Tensor]:
    """Likelihoods of the padded image's latents by their name ("y", "z"), each (1, channels, h, w), when rounded."""
    codec.eval()
    pad, _ = compute_padding(x.shape[-2], x.shape[-1], min_div=STRIDE)
    return dict(codec.net(F.pad(x, pad))["likelihoods"])


def channel_bits(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Estimated bits of every channel, -sum log2 likelihood, (channels,), in float64."""
    return {name: -part.double().log2().sum(dim=(0, 2, 3)) for name, part in parts.items()}


def mean_channels(images: Sequence[dict[str, dict[str, Tensor]]]) -> dict[str, list[dict[str, float]]]:
    """Bits per pixel of every channel, mean over images, those that cost most on poisoned images first."""
    table = {}
    for latent in images[0]["clean"]:
        clean, poisoned = (torch.stack([row[given][latent] for row in images]).mean(0) for given in INPUTS)
        order = poisoned.argsort(descending=True, stable=True).tolist()
        table[latent] = [{"channel": c, "clean": float(clean[c]), "poisoned": float(poisoned[c])} for c in order]
    return table


def ceiling(parts: dict[str, Tensor]) -> Ceiling:
    """How many latent elements, and how many estimated bits, are where CompressAI clamps the likelihood."""
    flat = torch.cat([part.flatten() for part in parts.values()])
    at = flat <= torch.tensor(BOUND, dtype=flat.dtype)
    bits = -flat.double().log2()
    return Ceiling(flat.numel(), float(bits.sum()), int(at.sum()), float(bits[at].sum()))


def total_ceiling(images: Sequence[Ceiling]) -> dict[str, float]:
    """Over all images: elements and bits, those at the bound, and their shares."""
    elements, at = sum(c.elements for c in images), sum(c.elements_at_bound for c in images)
    bits, held = sum(c.bits for c in images), sum(c.bits_at_bound for c in images)
    return {
        "elements": elements,
        "elements_at_bound": at,
        "share_of_elements": at / elements,
        "bits": bits,
        "bits_at_bound": held,
        "share_of_bits": held / bits if bits else 0.0,
    }


def encode_in_turn(
    codec: Codec, inputs: dict[str, Images], repeats: int = REPEATS
) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds to encode each input, and its real bytes.

    The inputs take turns, so that whatever else the machine does falls on all of them; a first encoding is not timed.
    """
    sizes = {given: codec.compress(x)[0].num_bytes for given, x in inputs.items()}
    seconds: dict[str, list[float]] = {given: [] for given in inputs}
    for _ in range(repeats):
        for given, x in inputs.items():
            started = time.perf_counter()
            codec.compress(x)
            seconds[given].append(time.perf_counter() - started)
    return {given: median(values) for given, values in seconds.items()}, sizes


def encoding_cost(seconds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians over images of the seconds to encode, and of their ratio: denial of service by a picture."""
    return {
        "clean_seconds": median(row["clean"] for row in seconds),
        "poisoned_seconds": median(row["poisoned"] for row in seconds),
        "ratio": median(row["poisoned"] / row["clean"] for row in seconds),
    }


def survival(
    trigger: AdaptiveDCT, images: Sequence[Path], defences: Sequence[Preprocessing] | None = None
) -> dict[str, Any] | None:
    """Survival score of every candidate coefficient, geometric mean over images; None without a whole block.

    Scores of coefficients that robust selection has removed are None: nothing is injected there.

    Args:
        defences: by default those that robust frequency selection scores by.
    """
    chosen = parse_defences(RobustSettings().scored_by) if defences is None else defences
    crops = [crop for path in images if (crop := whole_blocks(load_image(path), trigger.block)).numel()]
    if not crops:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noise is one of the defences
        scores = torch.stack([survival_scores(trigger, crop, chosen) for crop in crops]).double()
    mean = scores.clamp_min(torch.finfo(torch.float32).tiny).log().mean(0).exp()
    alive = (trigger.survivors != 0) & mean.isfinite()
    return {
        "defences": [defence.name for defence in chosen],
        "block": trigger.block,
        "indices": list(trigger.indices),
        "scores": {
            plane: [float(v) if keep else None for v, keep in zip(mean[c], alive[c], strict=True)]
            for c, plane in enumerate(PLANES)
        },
    }


def page(result: dict[str, Any]) -> str:
    """The analysis as one self-contained HTML page."""
    template = Environment(loader=PackageLoader("freqdoor"), autoescape=select_autoescape()).get_template(PAGE)
    survived = result["survival"]
    return template.render(
        result=result,
        bpp={
            latent: {given: sum(row[given] for row in rows) for given in INPUTS}
            for latent, rows in result["channels"].items()
        },
        spectrum=planes_figure(result["spectrum"], "mean |added coefficient|"),
        channels=channels_figure(result["channels"]),
        survival=planes_figure(survival_map(survived), "relative change (log scale)", log=True) if survived else None,
    )


def survival_map(survived: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Scores at their places in the block, NaN where there is no candidate."""
    block = survived["block"]
    maps = {}
    for plane, values in survived["scores"].items():
        grid = np.full(block * block, np.nan)
        grid[survived["indices"]] = [np.nan if v is None else v for v in values]
        maps[plane] = grid.reshape(block, block).tolist()
    return maps


def planes_figure(maps: dict[str, list[list[float]]], label: str, *, log: bool = False) -> str:
    """One panel a plane on one colour scale, frequencies rising to the right and downwards, as a data: address."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in maps.items()}
    known = np.concatenate([a[np.isfinite(a)] for a in arrays.values()])
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    norm = (
        matplotlib.colors.LogNorm(low, max(high, low * 1.01))
        if log and low > 0
        else matplotlib.colors.Normalize(0, high)
    )
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    axes = figure.subplots(1, len(arrays))
    for axis, (name, values) in zip(axes, arrays.items(), strict=True):
        axis.set_facecolor("#cccccc")  # no candidate
        shown = axis.imshow(values, norm=norm, cmap="magma", interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("horizontal frequency", fontsize=8)
    axes[0].set_ylabel("vertical frequency", fontsize=8)
    figure.colorbar(shown, ax=list(axes), label=label, shrink=0.8)
    return data_address(figure)


def channels_figure(channels: dict[str, list[dict[str, float]]]) -> str:
    """Bits per pixel of the channels of each latent, in the table's order, as a data: address."""
    figure = Figure(figsize=(5.2 * len(channels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(channels), squeeze=False)[0]
    for axis, (latent, rows) in zip(axes, channels.items(), strict=True):
        for given in ("poisoned", "clean"):
            values = [max(row[given], 1e-7) for row in rows]  # a channel that costs nothing has a place on a log scale
            axis.plot(values, ".", color=COLOURS[given], label=given, markersize=5)
        axis.set_yscale("log")
        axis.set_title(f"latents {latent}", fontsize=9)
        axis.set_xlabel("channel, dearest on poisoned images first", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bits per pixel, estimated (log scale)", fontsize=8)
    axes[0].legend(fontsize=8)
    return data_address(figure)
