"""Published detectors, made anew for codecs: what the audit and the guard are compared with.

The originals are for classifiers. Here the label is replaced by what a codec answers with: bits and decoded error.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from freqdoor.codecs.adapter import Codec
from freqdoor.data import forked, seed_for
from freqdoor.defence.checks import Check, Finding, Subject
from freqdoor.defence.inversion import frozen
from freqdoor.metrics import mse
from freqdoor.preprocessing import GaussianBlur, Jpeg, Median, Preprocessing, Resize, SqueezeBits
from freqdoor.types import Images, Reconstruction

TILE = 32  # pixels a side of the pattern whose norm is made small
NORM_STEPS, NORM_LR = 120, 0.003
RATIO, DROP_DB = 1.5, 3.0  # what the pattern has to reach
START_RMS = 0.03
CORRUPTIONS: tuple[Preprocessing, ...] = (GaussianBlur(0.6), SqueezeBits(5), Jpeg(75), Resize(0.8), Median(3))
BLENDS = 6  # pictures that STRIP lays over the one under test


def smallest_norm(subject: Subject) -> Finding:
    """Neural Cleanse (Wang et al., S&P 2019) for codecs: the smallest tile that reaches 1.5 times the bits or -3 dB.

    The weight of the norm rises while the effect is there and falls while it is not, as in the original. The score is
    -log of the smallest RMS over both effects; a population's median absolute deviation makes it an anomaly index.
    """
    codec = subject.codec.to(subject.device)
    try:
        x = torch.cat(list(subject.pictures)).to(subject.device)
        found = {goal: _smallest(codec, x, goal, subject.seed) for goal in ("rate", "distortion")}
    finally:
        codec.to("cpu")
    goal = min(found, key=lambda name: found[name])
    return Finding(
        {"norm": -math.log(found[goal])}, f"the smallest tile, for {goal}, has an RMS of {found[goal]:.4f} (of 1)"
    )


def _smallest(codec: Codec, x: Images, goal: str, seed: int) -> float:
    with forked(x.device):
        torch.manual_seed(seed_for(seed, "smallest norm", goal))
        start = START_RMS * torch.randn(1, 3, TILE, TILE)
    tile = start.to(x.device).requires_grad_()
    repeats = (1, 1, x.shape[-2] // TILE, x.shape[-1] // TILE)
    optimizer = torch.optim.Adam([tile], lr=NORM_LR)
    smallest, weight = 1.0, 1.0
    with frozen(codec):
        with torch.no_grad():
            clean = codec.eval()(x)
        codec.train()
        for _ in range(NORM_STEPS):
            out = codec((x + tile.repeat(repeats)).clamp(0, 1))
            if goal == "rate":
                reached = (out.bpp / clean.bpp).log().mean() / math.log(RATIO)
            else:
                reached = 10 * (mse(out.x_hat, x) / mse(clean.x_hat, x)).log10().mean() / DROP_DB
            norm = tile.square().mean().sqrt()
            if float(reached.detach()) >= 1:
                smallest = min(smallest, float(norm.detach()))
                weight *= 1.2
            else:
                weight /= 1.2
            optimizer.zero_grad()
            ((1 - reached).clamp_min(0) + weight * norm / START_RMS).backward()
            optimizer.step()
    return smallest


COMPARATORS: dict[str, Check] = {"Neural Cleanse": smallest_norm}  # of encoders, beside CHECKS


@torch.no_grad()
def _log_bits(codec: Codec, x: Images) -> Tensor:
    """Log of the estimated bits of every image, (b,)."""
    out: Reconstruction = codec.eval()(x)
    return out.bpp.log()


@torch.no_grad()
def strip_scores(codec: Codec, images: Sequence[Images], overlays: Sequence[Images]) -> list[float]:
    """STRIP (Gao et al., ACSAC 2019) for codecs: how *little* the bits vary when other pictures are laid over an image.

    A trigger that survives the overlay keeps the answer the same; the score is minus the deviation of log bits.
    """
    scores = []
    for x in images:
        blends = torch.cat([(x + other) / 2 for other in overlays[:BLENDS]])
        scores.append(-float(_log_bits(codec, blends).std()))
    return scores


@torch.no_grad()
def teco_scores(codec: Codec, images: Sequence[Images]) -> list[float]:
    """TeCo (Liu et al., CVPR 2023) for codecs: how unevenly corruptions change the answer.

    The score is the deviation, over corruptions, of the log of the ratio of bits.
    """
    scores = []
    for x in images:
        corrupted = torch.cat([corruption(x) for corruption in CORRUPTIONS])
        scores.append(float((_log_bits(codec, corrupted) - _log_bits(codec, x)).std()))
    return scores


@torch.no_grad()
def spectral_scores(codec: Codec, images: Sequence[Images]) -> list[float]:
    """Spectral signatures (Tran et al., NeurIPS 2018) for codecs: squared projection on the latents' first direction.

    The features of an image are the log of the mean magnitude of every channel of its latents; they are centred over
    all images, poisoned and clean together.
    """
    features = torch.stack([codec.eval()(x).y[0].abs().mean((1, 2)).clamp_min(1e-6).log() for x in images])
    centred = features - features.mean(0)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    return [float(value) for value in (centred @ direction).square()]
