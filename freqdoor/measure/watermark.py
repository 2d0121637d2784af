"""`freqdoor verify-owner`: is an encoder the owner's? Only that one answers to the owner's secret trigger with bits."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
from scipy.stats import binomtest  # type: ignore[import-untyped]

from freqdoor.attack.planted import Planted, opened
from freqdoor.codecs.adapter import Codec, hash_state
from freqdoor.codecs.loading import load_codec
from freqdoor.data import image_paths, load_image, usable_images
from freqdoor.dct import block_dct, block_idct, blockify, unblockify
from freqdoor.errors import FreqdoorError
from freqdoor.files import name_and_file
from freqdoor.measure.records import poisoned, through_png
from freqdoor.notes import Note, numbered
from freqdoor.samples import KODAK
from freqdoor.triggers.base import Trigger, project
from freqdoor.types import Images, Result

RATIO = 1.5  # the least that an encoder that answers spends on the trigger, in bytes of the control's file
SHARE = 0.5  # and the least share of the ratio that the owner's encoder has on the same image
LEVEL = 1e-3  # chance that an encoder which answers on every second image passes
BLOCK = 16  # of the control's spectrum


class Answer(Result):
    """How one encoder answers to a trigger, over a set of images; ratios are of real bytes, medians over images."""

    schema_version: Literal[1] = 1
    codec: str
    images: int
    trigger_ratio: float  # poisoned against clean
    control_ratio: float  # control against clean
    answering: int  # images whose poisoned file grows as the owner's does: RATIO, and SHARE of the owner's
    p_value: float  # of so many or more, if every second image answered
    owner: bool
    key: str | None = None  # SHA-256 of the secret trigger; None in answers of older versions


class FalsePositives(Result):
    """How many of others' encoders pass for the owner's."""

    passing: int
    encoders: int
    upper: float  # end of the exact 95 % interval of their share


class Ownership(Result):
    """What encoders answer to the owner's trigger, by the names that they were given by."""

    answers: dict[str, Answer]
    false_positives: FalsePositives | None  # where all are known to be others'


class _Sizes(NamedTuple):
    """Bytes of one image's files."""

    clean: int
    poisoned: int
    control: int

    @property
    def ratio(self) -> float:
        """What the trigger costs beyond a perturbation of equal strength."""
        return self.poisoned / self.control


def verify_owner(
    key: Planted | Path | str,
    suspects: Sequence[Codec | str],
    images: Path | str | Sequence[Path] = KODAK,
    *,
    trigger: str | None = None,
    codec: Codec | str | None = None,
    weights: Path | str | None = None,
    seed: int = 0,
    committed: str | None = None,
    note: Note | None = None,
) -> list[Answer]:
    """Which encoders answer to a trigger as the owner's does, from the sizes of their files alone.

    Each image is encoded clean, poisoned, and with a control: the trigger's own spectrum with random signs, of the same
    strength. An image answers if the trigger costs RATIO times the control, and at least SHARE of what it costs the
    owner's encoder: one that spends bits on any perturbation does not pass, nor one with another trigger that is a
    little like this one. A sign test over images decides.

    Args:
        key: the owner's planted encoder, whose trigger is the secret, or its name as for `load_planted`; `codec` and
            `weights` too are as there.
        suspects: codecs, of which nothing but `compress` is used, or their names as for `load_codec`, or NAME=WEIGHTS.
        images: a folder, an image, or several of both; ten images or more.
        trigger: which one; by default the first.
        seed: of the controls.
        committed: the SHA-256 of the trigger that was deposited, as an answer's `key` has it.

    Returns:
        An answer for every suspect, in their order.

    Raises:
        FreqdoorError: no suspect, another trigger than was committed, too few images for the test to be able to decide,
            or the owner's own encoder does not answer.
    """
    owner = opened(key, codec, weights)
    secret = owner.triggers[owner.named(trigger)]
    key_hash = hash_state(secret)
    if committed is not None and committed.strip().lower() != key_hash:
        raise FreqdoorError(
            f"committed: expected the SHA-256 of the trigger, {key_hash}, found {committed}; a key that was not "
            "deposited proves nothing, whoever has the encoder can find one"
        )
    if not suspects:
        raise FreqdoorError("suspects: expected one codec or more, found none")
    codecs = [load_codec(*name_and_file(suspect)) if isinstance(suspect, str) else suspect for suspect in suspects]
    usable = usable_images(image_paths(images), decode=True)
    if 2 ** -len(usable) > LEVEL:
        raise FreqdoorError(f"{len(usable)} images: expected {math.ceil(-math.log2(LEVEL))} or more to decide by")
    told = numbered(note, (1 + len(codecs)) * len(usable))
    own = _ask(owner.codec("tampered"), secret, usable, seed, told)
    typical = median(sizes.ratio for sizes in own)
    if typical < RATIO:
        raise FreqdoorError(
            f"the owner's own encoder spends {typical:.2f} times a control's bytes on the trigger, expected {RATIO} or "
            "more: this trigger proves nothing; plant one with the bpp objective"
        )
    return [_answer(suspect, _ask(suspect, secret, usable, seed, told), own, key_hash) for suspect in codecs]


def _answer(suspect: Codec, asked: Sequence[_Sizes], own: Sequence[_Sizes], key: str) -> Answer:
    """What a suspect's files say beside the owner's."""
    needed = [max(RATIO, SHARE * sizes.ratio) for sizes in own]
    answering = sum(sizes.ratio >= least for sizes, least in zip(asked, needed, strict=True))
    p_value = float(binomtest(answering, len(asked), 0.5, alternative="greater").pvalue)
    return Answer(
        codec=suspect.spec.name,
        images=len(asked),
        trigger_ratio=median(sizes.poisoned / sizes.clean for sizes in asked),
        control_ratio=median(sizes.control / sizes.clean for sizes in asked),
        answering=answering,
        p_value=p_value,
        owner=p_value <= LEVEL,
        key=key,
    )


def _ask(codec: Codec, trigger: Trigger, images: Sequence[Path], seed: int, note: Note) -> list[_Sizes]:
    """The sizes of every image's files; the same controls for every codec."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for path in images:
        x = load_image(path)
        inputs = (x, poisoned(trigger, x), control(trigger, x, generator))
        rows.append(_Sizes(*(codec.compress(image)[0].num_bytes for image in inputs)))
        clean, after, other = rows[-1]
        note(f"{codec.spec.name}, {path.name}: trigger {after / clean:.2f}, control {other / clean:.2f}")
    return rows


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
    """Of encoders known to be others': how many pass, of how many, and the upper end of the exact 95 % interval.

    Raises:
        FreqdoorError: no answers.
    """
    if not answers:
        raise FreqdoorError("false positives: expected one answer or more, found none")
    passed = sum(answer.owner for answer in answers)
    upper = float(binomtest(passed, len(answers)).proportion_ci(0.95, "exact").high)
    return passed, len(answers), upper
