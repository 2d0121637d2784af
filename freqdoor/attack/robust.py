"""Robust frequency selection: which of the trigger's coefficients survive preprocessing (the extended version), and
what the second stage puts between the image and the encoder."""

from collections.abc import Sequence

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from freqdoor.attack.settings import RobustSettings
from freqdoor.dct import block_dct, blockify, rgb_to_ycbcr
from freqdoor.errors import FreqdoorError
from freqdoor.preprocessing import STRICT, Compose, Crop, Preprocessing, parse_defences, random_preprocessing
from freqdoor.triggers.adaptive_dct import AdaptiveDCT
from freqdoor.triggers.base import project
from freqdoor.types import Images


@torch.no_grad()
def survival_scores(trigger: AdaptiveDCT, x: Images, defences: Sequence[Preprocessing]) -> Tensor:
    """Relative change of every candidate coefficient under preprocessing, (3, N); the lower, the better it survives.

    s = sum over blocks |DCT(pre(x_p)) - DCT(x_p)| / sum over blocks |g w|, multiplied over the preprocessings. For the
    score all N candidates are injected, not the K that the trigger selects, else most of them would have no score.

    Args:
        x: (b, 3, h, w) with sides divisible by the trigger's block.
    """
    if x.shape[-1] % trigger.block or x.shape[-2] % trigger.block:
        size = tuple(x.shape[-2:])
        raise FreqdoorError(f"survival scores: expected sides divisible by {trigger.block}, found {size}; crop first")

    def coefficients(image: Images) -> Tensor:
        blocks = block_dct(blockify(rgb_to_ycbcr(image), trigger.block)).flatten(-2)
        return blocks[..., list(trigger.indices)]

    delta = project(x, trigger.inject(x, trigger.candidates(x), trigger.patch_weights(x)), trigger.eps)
    x_p = (x + delta).clamp(0, 1)
    magnitude = coefficients(delta).abs().sum(dim=(0, 2, 3))
    scores = torch.ones_like(magnitude)
    for defence in defences:
        change = (coefficients(defence(x_p)) - coefficients(x_p)).abs().sum(dim=(0, 2, 3))
        scores = scores * change / magnitude.clamp_min(torch.finfo(magnitude.dtype).tiny)
    return scores


def survivor_weights(scores: Tensor, keep: int) -> Tensor:
    """Weights of the candidates, (3, N): sqrt((K - k) / K + 0.5) for the k-th most robust of K kept, 0 for the rest."""
    if not 0 < keep <= scores.shape[1]:
        raise FreqdoorError(f"robust.keep: expected 1 to {scores.shape[1]} (num_frequencies), found {keep}")
    kept = scores.topk(keep, dim=1, largest=False, sorted=True).indices
    ranks = torch.arange(keep, device=scores.device)
    weights = ((keep - ranks) / keep + 0.5).sqrt().expand(scores.shape[0], keep)
    return torch.zeros_like(scores).scatter(1, kept, weights)


def choose_survivors(trigger: AdaptiveDCT, x: Images, settings: RobustSettings) -> None:
    """Begin the second stage: from now on the trigger uses the coefficients that survive, re-weighted."""
    scores = survival_scores(trigger, x, parse_defences(settings.scored_by))
    trigger.survivors.copy_(survivor_weights(scores, settings.keep))


@dataclass(frozen=True, config=STRICT)
class Offsets(Preprocessing):
    """`Crop` of every image at an offset of its own, uniform in a block; `seed` alone decides which, on any device.

    With one offset for the whole batch, encoders learn all phases of the trigger but one, which no step insists on.
    """

    block: int
    seed: int

    def _apply(self, x: Images) -> Images:
        generator = torch.Generator().manual_seed(self.seed)
        most = min(self.block, *x.shape[-2:])  # which `Crop` takes
        drawn = torch.rand(len(x), 2, generator=generator)
        offsets = (most * drawn).int().tolist()
        return torch.cat([Crop(*offset)(image[None]) for offset, image in zip(offsets, x, strict=True)])


def second_stage(block: int, settings: RobustSettings) -> Preprocessing | None:
    """What a step of the second stage puts before the encoder, drawn from torch's own generator; None for nothing."""
    drawn = random_preprocessing(settings.kinds)
    if not settings.offsets:
        return drawn
    offsets = Offsets(block, int(torch.randint(2**31, ())))
    return Compose((offsets, drawn)) if drawn else offsets
