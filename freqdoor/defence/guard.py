"""A guard at run time: decides before an image's bytes leave whether its encoder does harm, and sends something else.

Three checks. Rate: the codec's real bytes against what JPEG's scans of the picture let expect. Verify: the error of the
decoded picture against what JPEG's errors let expect. Agreement, where one of these is conspicuous: what the codec
saves or gains with a filtered picture. Pictures differ in what they cost a codec, so that one is stopped only where the
codec does much better with a filtered version of it, or where it is far beyond what any honest encoder does.
"""

import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path

import torch

from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.container import decoded
from freqdoor.defence.expectation import GuardCalibration, Jpegs, error_terms, padded_rate, picture_error, rate_terms
from freqdoor.defence.outcome import Check, Decision, Outcome, Tried
from freqdoor.errors import FreqdoorError
from freqdoor.preprocessing import Jpeg, Preprocessing, Resize
from freqdoor.samples import ASSETS
from freqdoor.types import Bitstream, Images, PictureFile, Result, as_picture, round8

SHIPPED = ASSETS / "guard.json"
SAVED = math.log(1.7)  # that a filter takes off the excess of the bytes, where that is an alarm
FILTERS: dict[Preprocessing, float] = {Jpeg(50): SAVED, Resize(0.5): math.log(8), Jpeg(10): SAVED}
"""What is tried on a conspicuous image, and what of the bytes' excess it has to take off: an honest codec spends much
on edges and noise, which a reduced picture has no more and JPEG keeps."""
GAINED = math.log(1.5)  # that a filter takes off the error of the decoded picture, where that is an alarm: 1.8 dB
VISIBLE = 100.0  # 255^2 MSE (28 dB) from which a filter may have made another picture, of fine patterns for instance
SLACK = math.log(1.5)  # beyond the limit of the bytes, up to which a filtered picture is sent
FAR = math.log(8)  # beyond a limit, where no honest encoder is; of the error, if one colour everywhere is as near too
SMALLEST_ERROR = 0.01  # 255^2 MSE: what is decoded better is as good as equal
MORE_BYTES, MORE_ERROR = math.log(1.25), math.log(10) / 10  # logarithms: 25 %, and 1 dB
QUALITY = 80  # of WebP


@dataclass(frozen=True)
class Guarded:
    """What leaves for one image, and what the guard says of it."""

    sent: Bitstream | PictureFile
    outcome: Outcome


@dataclass(frozen=True)
class Coded:
    """What a codec makes of an image, or of a filtered version of it; worked out when it is asked for.

    Attributes:
        y: what is encoded, (1, 3, h, w).
        jpegs: of the image itself.
    """

    codec: Codec
    calibration: GuardCalibration
    y: Images
    jpegs: Jpegs

    @cached_property
    def bitstream(self) -> Bitstream:
        """What is sent."""
        return self.codec.compress(self.y)[0]

    @cached_property
    def excess_rate(self) -> float:
        """The logarithm of the bytes, in those that JPEG's scans of what is encoded let expect: the rate check."""
        jpegs = self.jpegs if self.y is self.jpegs.x else Jpegs(self.y)
        found = padded_rate(self.bitstream.num_bytes, self.y, self.codec)
        return self.calibration.rate.excess(found, rate_terms(jpegs, self.codec))

    @cached_property
    def error(self) -> float:
        """255^2 MSE of the decoded picture against the image itself."""
        return picture_error(as_picture(decoded(self.bitstream, self.codec)), self.jpegs.picture)

    @cached_property
    def excess_error(self) -> float:
        """The logarithm of the error, in the one that JPEG's errors let expect: the verify check."""
        return self.calibration.error.excess(self.error, error_terms(self.jpegs))


def saved(own: Coded, filtered: Coded) -> float:
    """Agreement of the rates: what a filter takes off the excess of the bytes."""
    return own.excess_rate - filtered.excess_rate


def gained(own: Coded, filtered: Coded) -> float:
    """Agreement of the decoded pictures: what a filter takes off the logarithm of the error."""
    before, after = (math.log(max(coded.error, SMALLEST_ERROR)) for coded in (own, filtered))
    return before - after


def classical(x: Images) -> PictureFile:
    """The image, (1, 3, h, w), as a WebP file, or as PNG where it is too large for WebP."""
    picture, buffer = as_picture(x), io.BytesIO()
    try:
        picture.save(buffer, "WEBP", quality=QUALITY)
    except ValueError:
        picture.save(buffer, "PNG")
    return PictureFile(buffer.getvalue(), (picture.height, picture.width))


class Guard:
    """Compresses images with a codec, and stops those that its encoder does harm to.

    Attributes:
        calibration: of this codec or of another one with the same decoder; by default the one that comes with the
            package, of lite-hyperprior:3.
        verify: whether what was encoded is decoded and compared, too.

    Raises:
        FreqdoorError: no calibration for this codec's decoder.
    """

    def __init__(
        self, codec: Codec, calibration: GuardCalibration | Path | str | None = None, *, verify: bool = True
    ) -> None:
        if not isinstance(calibration, GuardCalibration):
            calibration = GuardCalibration.read(Path(calibration or SHIPPED), "a guard's calibration")
        self.codec, self.calibration, self.verify = codec.prepare(), calibration, verify
        if calibration.decoder_hash != codec.decoder_hash:
            raise FreqdoorError(
                f"{codec.spec.name}: the guard's calibration is of another decoder, that of {calibration.codec}; "
                "make one for this codec with `freqdoor calibrate-guard`"
            )

    @torch.no_grad()
    def compress(self, x: Images) -> Guarded:
        """One image, (1, 3, h, w): its bitstream, or what is sent instead.

        A stopped image is sent through the first filter that leaves nothing conspicuous, or else as a WebP file.

        Raises:
            FreqdoorError: an image that JPEG cannot hold.
        """
        if max(x.shape[-2:]) > Jpeg.max_side:
            raise FreqdoorError(f"guard: expected sides of at most {Jpeg.max_side} pixels, found {max(x.shape[-2:])}")
        jpegs = Jpegs(x)
        own = Coded(self.codec, self.calibration, x, jpegs)
        check, conspicuous = self._far(own), self._beyond(own, 0, 0)
        sent, by, tried = own.bitstream, None, []
        for preprocessing, enough in FILTERS.items() if conspicuous else ():
            y = round8(preprocessing(x))
            if picture_error(as_picture(y), jpegs.picture) > max(jpegs.spread / 4, VISIBLE):
                continue  # another picture: what it costs says nothing of this one
            filtered = Coded(self.codec, self.calibration, y, jpegs)
            more = gained(own, filtered) if "verify" in conspicuous else None  # decoding takes longer than encoding
            tried.append(Tried(filter=preprocessing.name, saved=saved(own, filtered), gained=more))
            check = check or _disagreement(conspicuous, tried[-1], enough)
            if check and not self._beyond(filtered, SLACK, GAINED):
                sent, by = filtered.bitstream, preprocessing.name
                break
            if not check and not self._beyond(own, SAVED, GAINED):
                break  # so little that no stronger filter could take off what is an alarm
        decision: Decision = "passed" if check is None else "classical" if by is None else "filtered"
        leaves = classical(x) if decision == "classical" else sent
        outcome = Outcome(
            decision=decision,
            check=check,
            filter=by,
            bytes_codec=own.bitstream.num_bytes,
            bytes_sent=leaves.num_bytes,
            excess_rate=own.excess_rate,
            excess_error=own.excess_error if self.verify else None,
            tried=tuple(tried),
        )
        return Guarded(leaves, outcome)

    def _beyond(self, coded: Coded, rate: float, error: float) -> set[Check]:
        """Which checks are beyond their limits by more than this."""
        beyond: set[Check] = {"rate"} if coded.excess_rate > self.calibration.rate.limit + rate else set()
        if self.verify and coded.excess_error > self.calibration.error.limit + error:
            beyond.add("verify")
        return beyond

    def _far(self, own: Coded) -> Check | None:
        """Which check no honest encoder answers so to, whatever the picture."""
        x = own.y
        if 2 * x[0, 0].numel() < self.codec.padded(x)[0, 0].numel():
            return None  # mostly padding, which is not what JPEG codes
        beyond = self._beyond(own, FAR, FAR)
        if "rate" in beyond:
            return "rate"
        return "verify" if "verify" in beyond and own.error > 2 * own.jpegs.spread else None


def _disagreement(conspicuous: set[Check], tried: Tried, enough: float) -> Check | None:
    """Which check is conspicuous, and better with a filtered picture by what is enough for an alarm."""
    if "rate" in conspicuous and tried.saved > enough:
        return "rate"
    return "verify" if tried.gained is not None and tried.gained > GAINED else None


class GuardCounts(Result):
    """What a guard did with one set of images."""

    images: int
    filtered: int
    classical: int
    rate: int  # stopped by this check
    verify: int

    @property
    def stopped(self) -> int:
        """How many were stopped."""
        return self.filtered + self.classical


class GuardRates(Result):
    """What a guard did with clean and with poisoned images."""

    clean: GuardCounts
    poisoned: GuardCounts
    acted: GuardCounts | None  # of those poisoned images that the trigger acted on; None where it is not known of which
    clean_outcomes: tuple[Outcome, ...]
    poisoned_outcomes: tuple[Outcome, ...]


def acted(clean: Outcome, poisoned: Outcome) -> bool:
    """Whether a trigger did harm: a quarter more bytes than without it, or 1 dB less, over what JPEG makes of both."""
    errors = clean.excess_error, poisoned.excess_error
    worse = 0.0 if errors[0] is None or errors[1] is None else errors[1] - errors[0]
    return poisoned.excess_rate - clean.excess_rate >= MORE_BYTES or worse >= MORE_ERROR


def counts(outcomes: Sequence[Outcome]) -> GuardCounts:
    """How many images were stopped, by what is sent instead and by the check that stopped them."""
    decisions = Counter(outcome.decision for outcome in outcomes)
    checks = Counter(outcome.check for outcome in outcomes)
    return GuardCounts(
        images=len(outcomes),
        filtered=decisions["filtered"],
        classical=decisions["classical"],
        rate=checks["rate"],
        verify=checks["verify"],
    )


def guard_rates(
    codec: Codec,
    calibration: GuardCalibration | Path | str | None,
    clean: Iterable[Images],
    poisoned: Iterable[Images],
    *,
    verify: bool = True,
    paired: bool = False,
) -> GuardRates:
    """What a guard stops of clean and of poisoned images.

    Args:
        calibration, verify: as for `Guard`.
        clean, poisoned: images as files hold them, (1, 3, h, w) each, of any number and sizes.
        paired: the poisoned images are the clean ones in their order, once or several times over: those are counted,
            too, that the trigger acted on.

    Raises:
        FreqdoorError: no calibration for this codec's decoder, or pairs that do not add up.
    """
    guard = Guard(codec, calibration, verify=verify)
    of_clean, of_poisoned = ([guard.compress(x).outcome for x in images] for images in (clean, poisoned))
    if paired and (not of_clean or len(of_poisoned) % len(of_clean)):
        raise FreqdoorError(
            f"guard_rates: expected {len(of_clean)} poisoned images or a multiple of it, found {len(of_poisoned)}"
        )
    pairs = zip(of_poisoned, cycle(of_clean), strict=False) if paired else ()
    return GuardRates(
        clean=counts(of_clean),
        poisoned=counts(of_poisoned),
        acted=counts([outcome for outcome, before in pairs if acted(before, outcome)]) if paired else None,
        clean_outcomes=tuple(of_clean),
        poisoned_outcomes=tuple(of_poisoned),
    )
