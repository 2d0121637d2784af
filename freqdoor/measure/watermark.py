"""`freqdoor verify-owner`: is an encoder the owner's?

Only that one answers to the owner's secret trigger with bits, and only its copies have the weights that planting left.
"""

import hashlib
import json
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
from freqdoor.data import centre, image_paths, load_image, usable_images
from freqdoor.dct import block_dct, block_idct, blockify, unblockify
from freqdoor.errors import FreqdoorError
from freqdoor.files import name_and_file
from freqdoor.measure.descent import convolutions, likeness
from freqdoor.measure.records import poisoned, through_png
from freqdoor.notes import Note, numbered
from freqdoor.samples import KODAK
from freqdoor.triggers.base import Trigger, project
from freqdoor.types import Images, Result

RATIO = 1.5  # the least that an encoder that answers spends on the trigger, in bytes of the control's file
SHARE = 0.5  # and the least share of the ratio that the owner's encoder has on the same image
LEVEL = 1e-3  # chance that an encoder which answers on every second image passes
BLOCK = 16  # of the control's spectrum
LIKENESS = 0.5  # of a copy's weights, at least: half way from the nearest stranger's to the furthest copy's
SEEN, CROP = 4, 256  # images, and pixels a side, that channels are recognised by

Evidence = Literal["files", "weights"]


class Answer(Result):
    """How one encoder answers to a trigger, over a set of images; ratios are of real bytes, medians over images."""

    schema_version: Literal[1] = 1
    codec: str
    images: int
    trigger_ratio: float  # poisoned against clean
    control_ratio: float  # control against clean
    answering: int  # images whose poisoned file grows as the owner's does: RATIO, and SHARE of the owner's
    p_value: float  # of so many or more, if every second image answered
    likeness: float | None = None  # of its weights' changes to the owner's; None: not comparable, or not committed to
    evidence: tuple[Evidence, ...] = ()  # by which it is the owner's; none in answers of older versions
    owner: bool
    key: str | None = None  # SHA-256 of the secret trigger; None in answers of older versions
    deposit: str | None = None  # SHA-256 of the trigger, the owner's encoder and its vanilla codec


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
    """Which encoders are the owner's: by the sizes of their files alone, and by their weights where these are at hand.

    Files: each image is encoded clean, poisoned, and with a control: the trigger's own spectrum with random signs, of
    the same strength. An image answers if the trigger costs RATIO times the control, and at least SHARE of what it
    costs the owner's encoder: one that spends bits on any perturbation does not pass, nor one with another trigger that
    is a little like this one. A sign test over images decides. Weights: a copy has LIKENESS or more (`likeness`).

    Args:
        key: the owner's planted encoder, whose trigger is the secret, or its name as for `load_planted`; `codec` and
            `weights` too are as there. A judge takes the vanilla codec from its publisher: whoever may choose it can
            make others' encoders his.
        suspects: codecs, or their names as for `load_codec`, or NAME=WEIGHTS; of any other object with a `spec` nothing
            but `compress` is used.
        images: a folder, an image, or several of both; ten images or more.
        trigger: which one; by default the first.
        seed: of the controls.
        committed: the SHA-256 that was deposited, an answer's `deposit`; or its `key`, as older versions had it, which
            holds for the trigger alone: weights count for nothing then.

    Returns:
        An answer for every suspect, in their order.

    Raises:
        FreqdoorError: no suspect, another key than was committed, too few images for the test to be able to decide,
            or the owner's own encoder does not answer.
    """
    owner = opened(key, codec, weights)
    secret = owner.triggers[owner.named(trigger)]
    hashes = hash_state(secret), deposit_of(owner, secret)
    _check_committed(committed, *hashes)
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
    if committed is not None and _same(committed, hashes[0]):
        alike: list[float | None] = [None] * len(codecs)
    else:
        alike = _likenesses(owner, codecs, usable)
    return [
        _answer(suspect, _ask(suspect, secret, usable, seed, told), own, value, hashes)
        for suspect, value in zip(codecs, alike, strict=True)
    ]


def deposit_of(owner: Planted, secret: Trigger) -> str:
    """SHA-256 over a trigger, the encoder that it opens and the vanilla codec: what an owner deposits beforehand."""
    facts = [hash_state(secret), owner.header.modules_before, owner.header.modules_after]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_committed(committed: str | None, key: str, deposit: str) -> None:
    if committed is not None and not any(_same(committed, value) for value in (key, deposit)):
        raise FreqdoorError(
            f"committed: expected the SHA-256 of this key and encoder, {deposit}, or of the key alone, {key}, found "
            f"{committed}; a key that was not deposited proves nothing, whoever has the encoder can make one"
        )


def _same(committed: str, value: str) -> bool:
    return committed.strip().lower() == value


def _likenesses(owner: Planted, suspects: Sequence[Codec], usable: Sequence[Path]) -> list[float | None]:
    """How alike the suspects' weights are to the owner's; None for what is no codec, but answers as one."""
    if not any(isinstance(suspect, Codec) for suspect in suspects):
        return [None] * len(suspects)
    images = [centre(load_image(path), CROP) for path in usable[:SEEN]]
    vanilla, own = (convolutions(codec, images) for codec in (owner.vanilla, owner.tampered))
    return [
        likeness(vanilla, own, convolutions(suspect, images)) if isinstance(suspect, Codec) else None
        for suspect in suspects
    ]


def _answer(
    suspect: Codec, asked: Sequence[_Sizes], own: Sequence[_Sizes], alike: float | None, hashes: tuple[str, str]
) -> Answer:
    """What a suspect's files say beside the owner's, and its weights."""
    needed = [max(RATIO, SHARE * sizes.ratio) for sizes in own]
    answering = sum(sizes.ratio >= least for sizes, least in zip(asked, needed, strict=True))
    p_value = float(binomtest(answering, len(asked), 0.5, alternative="greater").pvalue)
    evidence: list[Evidence] = ["files"] if p_value <= LEVEL else []
    if alike is not None and alike >= LIKENESS:
        evidence.append("weights")
    return Answer(
        codec=suspect.spec.name,
        images=len(asked),
        trigger_ratio=median(sizes.poisoned / sizes.clean for sizes in asked),
        control_ratio=median(sizes.control / sizes.clean for sizes in asked),
        answering=answering,
        p_value=p_value,
        likeness=alike,
        evidence=tuple(evidence),
        owner=bool(evidence),
        key=hashes[0],
        deposit=hashes[1],
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
