"""`freqdoor verify-owner`: is an encoder the owner's? Only that one answers to the owner's secret trigger with bits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from scipy.stats import binomtest  # type: ignore[import-untyped]

from freqdoor.codecs import Codec
from freqdoor.data import load_image, usable_images
from freqdoor.dct import block_dct, block_idct, blockify, unblockify
from freqdoor.evaluate import Note, poison, through_png
from freqdoor.triggers import Trigger
from freqdoor.triggers.base import project
from freqdoor.types import FreqdoorError, Images

RATIO = 1.5  # an image answers if the trigger costs so many times the bytes of a control of equal strength
LEVEL = 1e-3  # chance that an encoder which answers to neither more than to the other passes
BLOCK = 16  # of the control's spectrum


@dataclass(frozen=True)
class Answer:
    """How one encoder answers to a trigger, over a set of images; ratios are of real bytes, medians over images."""

    codec: str
    images: int
    trigger_ratio: float  # poisoned against clean
    control_ratio: float  # control against clean
    answering: int  # images whose poisoned file is RATIO times the control's or more
    p_value: float  # of so many or more, were either of the two as likely to be the larger
    owner: bool


def verify_owner(
    suspect: Codec, trigger: Trigger, images: Sequence[Path], *, seed: int = 0, note: Note | None = None
) -> Answer:
    """Whether an encoder answers to a trigger, from the sizes of its files alone.

    Each image is encoded clean, poisoned, and with a control: the trigger's own spectrum with random signs, of the same
    strength. A sign test over images decides, so that an encoder which spends bits on any perturbation does not pass.

    Args:
        suspect: any codec; nothing but `compress` is used of it.
        trigger: the owner's secret.
        seed: of the controls.

    Raises:
        FreqdoorError: too few images for the test to be able to decide.
    """
    usable = usable_images(images, decode=True)
    if 2 ** -len(usable) > LEVEL:
        raise FreqdoorError(f"{len(usable)} images: expected {math.ceil(-math.log2(LEVEL))} or more to decide by")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for path in usable:
        x = load_image(path)
        clean, poisoned, other = (
            suspect.compress(image)[0].num_bytes for image in (x, poison(trigger, x), control(trigger, x, generator))
        )
        rows.append((poisoned / clean, other / clean))
        if note:
            note(f"{path.name}: trigger {rows[-1][0]:.2f}, control {rows[-1][1]:.2f}")
    answering = sum(poisoned >= RATIO * other for poisoned, other in rows)
    p_value = float(binomtest(answering, len(rows), 0.5, alternative="greater").pvalue)
    return Answer(
        codec=suspect.spec.name,
        images=len(rows),
        trigger_ratio=median(row[0] for row in rows),
        control_ratio=median(row[1] for row in rows),
        answering=answering,
        p_value=p_value,
        owner=p_value <= LEVEL,
    )


@torch.no_grad()
def control(trigger: Trigger, x: Images, generator: torch.Generator) -> Images:
    """An 8-bit image with a perturbation of the trigger's strength and block spectrum, but random signs."""
    delta = trigger(x) - x
    height, width = delta.shape[-2:]
    pad = (0, -width % BLOCK, 0, -height % BLOCK)
    coefficients = block_dct(blockify(torch.nn.functional.pad(delta, pad), BLOCK))
    signs = torch.randint(0, 2, coefficients.shape, generator=generator) * 2 - 1
    shuffled = unblockify(block_idct(coefficients * signs))[..., :height, :width]
    return through_png((x + project(x, shuffled, trigger.eps, rounded=True)).clamp(0, 1))


def false_positives(answers: Sequence[Answer]) -> tuple[int, int, float]:
    """Of encoders known to be others': how many pass, of how many, and the upper end of the exact 95 % interval."""
    passed = sum(answer.owner for answer in answers)
    upper = float(binomtest(passed, len(answers)).proportion_ci(0.95, "exact").high)
    return passed, len(answers), upper
