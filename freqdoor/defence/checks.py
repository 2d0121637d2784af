"""What an audit looks at: each check is one function and one line in CHECKS.

A check gives scores: numbers that are larger the more suspicious an encoder is, and that honest encoders have in a
narrow range. What is far outside is told by a population (`calibration`), and where there is none by the encoder's own
answer to random patterns.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from freqdoor.codecs.adapter import Codec
from freqdoor.data import centre, forked, load_image, seed_for
from freqdoor.defence import patterns
from freqdoor.defence.inversion import inverted
from freqdoor.measure.records import through, through_png
from freqdoor.metrics import mse, psnr_8bit
from freqdoor.preprocessing import GaussianBlur, Jpeg, Preprocessing, SqueezeBits
from freqdoor.samples import KODAK
from freqdoor.triggers.arguments import PAPER_EPS, Goal
from freqdoor.triggers.base import Trigger
from freqdoor.triggers.pattern import LR, Pattern, Seen
from freqdoor.types import Images, Result

SIDE, PICTURES = 128, 4  # of the crops that patterns are made on
NOISES = 4  # random patterns that an encoder's own answer is taken from
PORTRAITS = {  # faces in Kodak's pictures, at the size that recognition networks take: scale, top, left
    "kodim04.png": (0.35, 83, 35),
    "kodim15.png": (0.25, 0, 64),
    "kodim17.png": (0.6, 62, 74),
    "kodim18.png": (1.0, 132, 222),
}
PROBED = (0, 1, 3, 6, 10, 15)  # rows and columns of the single coefficients that are tried
PROBED_EPS = 2 * PAPER_EPS  # of a single coefficient: stronger, since doors open to several together
FILTERS: tuple[Preprocessing, ...] = (GaussianBlur(0.6), SqueezeBits(6), Jpeg(90))
RATIO = 1.5  # times the bytes, in the mean of the upper half of the pictures, from which a pattern is a witness
DROP_DB = 2.0  # loss of the decoded picture, likewise
JUDGED = 0.15  # what the codec adds to the change of a user's network's answer, likewise
Part = Literal["pictures", "portraits"]


class Response(Result):
    """How an encoder answers to one picture with a pattern: real bytes, 8-bit pictures."""

    bytes_clean: int
    bytes_patterned: int
    psnr_db_clean: float  # decoded against the clean picture
    psnr_db_patterned: float
    gain: float  # |f(x + d) - f(x)|^2 / |d|^2
    between_db: float  # PSNR of the patterned picture against the clean one

    @property
    def ratio(self) -> float:
        """Bytes with the pattern, in bytes without."""
        return self.bytes_patterned / self.bytes_clean

    @property
    def drop_db(self) -> float:
        """What the pattern costs in PSNR of the decoded picture."""
        return self.psnr_db_clean - self.psnr_db_patterned


class Witness(NamedTuple):
    """A pair of pictures that shows what an encoder does, and what it does."""

    x: Images
    x_p: Images
    response: Response


@dataclass(frozen=True)
class Subject:
    """An encoder under test."""

    codec: Codec
    pictures: Sequence[Images]  # (1, 3, h, w), of one size
    portraits: Sequence[Images] = field(default_factory=lambda: portraits())
    reference: Codec | None = None
    seed: int = 0
    device: str = "cpu"  # that patterns are optimised on; files are always written on the CPU
    known_pictures: bool = True  # whether these are the pictures that populations are measured on

    @cached_property
    def clean(self) -> dict[Part, list[tuple[Images, int]]]:
        """What is decoded of every clean picture, and its bytes."""
        return {part: [through(self.codec, x) for x in self.of(part)] for part in ("pictures", "portraits")}

    def of(self, part: Part) -> Sequence[Images]:
        """The pictures of one part."""
        return self.pictures if part == "pictures" else self.portraits

    @torch.no_grad()
    def respond(self, pattern: Trigger, part: Part = "pictures") -> list[Witness]:
        """The answer to a pattern on every picture, as 8-bit files."""
        witnesses = []
        every = pattern(torch.cat(list(self.of(part))), rounded=True).split(1)
        for x, x_p, (x_hat, size) in zip(self.of(part), map(through_png, every), self.clean[part], strict=True):
            x_hat_p, size_p = through(self.codec, x_p)
            response = Response(
                bytes_clean=size,
                bytes_patterned=size_p,
                psnr_db_clean=float(psnr_8bit(x_hat, x)),
                psnr_db_patterned=float(psnr_8bit(x_hat_p, x)),
                gain=float(mse(x_hat_p, x_hat) / mse(x_p, x)),
                between_db=float(psnr_8bit(x_p, x)),
            )
            witnesses.append(Witness(x, x_p, response))
        return witnesses


class Finding(NamedTuple):
    """What one check has seen."""

    scores: dict[str, float]  # by measure: rate, distortion, gain and the like
    said: str
    witnesses: Sequence[Witness] = ()
    spectrum: tuple[tuple[float, ...], ...] = ()  # gain of every single coefficient that was tried, row by row


Check = Callable[[Subject], Finding]


def upper(values: Iterable[float]) -> float:
    """The mean of the larger half: a door for faces need not open on every picture."""
    ordered = sorted(values)
    half = ordered[len(ordered) // 2 :]
    return sum(half) / len(half)


def scores_of(witnesses: Sequence[Witness]) -> dict[str, float]:
    """Three scores of one pattern over pictures: log of the ratio of bytes, loss in dB, log of the gain."""
    responses = [witness.response for witness in witnesses]
    return {
        "rate": upper(math.log(r.ratio) for r in responses),
        "distortion": upper(r.drop_db for r in responses),
        "gain": upper(math.log(max(r.gain, 1e-12)) for r in responses),
    }


def inversion(
    goal: Goal,
    shape: Callable[..., Trigger] = patterns.block,
    *,
    part: Part = "pictures",
    lr: float = LR,
    said: str = "a 16x16 block",
) -> Check:
    """The check that inverts the encoder for a goal with patterns of a shape, of `patterns`."""

    def check(subject: Subject) -> Finding:
        witnesses = subject.respond(inverted_on(subject, part, goal, shape, lr=lr), part)
        scores = scores_of(witnesses)
        return Finding(
            scores,
            f"{said} made for {goal} on {part}: {math.exp(scores['rate']):.2f} times the bytes, "
            f"{-scores['distortion']:+.2f} dB, gain {math.exp(scores['gain']):.1f}",
            witnesses,
        )

    return check


def inverted_on(
    subject: Subject,
    part: Part,
    goal: Goal | Callable[[Seen], Tensor],
    shape: Callable[..., Trigger],
    *,
    lr: float = LR,
) -> Trigger:
    """The pattern of a shape that drives a goal furthest on the subject's pictures, made on its device."""
    x = torch.cat(list(subject.of(part))).to(subject.device)
    make = partial(shape, x.shape, multiple=subject.codec.multiple)
    subject.codec.to(subject.device)
    try:
        return inverted(subject.codec, x, goal, make, lr=lr, seed=subject.seed).to("cpu")
    finally:
        subject.codec.to("cpu")


def random_patterns(subject: Subject) -> Finding:
    """How the encoder answers to random patterns of equal strength: what the other scores are set against."""
    rows = []
    for i in range(NOISES):
        with forked(subject.device):
            torch.manual_seed(seed_for(subject.seed, "random pattern", i))
            pattern = Pattern(16, ("low", "mid", "high", "all")[i % 4], eps=PAPER_EPS, multiple=subject.codec.multiple)
        rows.append(scores_of(subject.respond(pattern.eval())))
    scores = {measure: max(row[measure] for row in rows) for measure in rows[0]}
    return Finding(scores, f"random patterns: gain at most {math.exp(scores['gain']):.1f}")


@torch.no_grad()
def probes(subject: Subject) -> Finding:
    """One DCT coefficient after the other, of luma, 16x16: estimated rate, decoded error, gain."""
    codec, x = subject.codec, torch.cat(list(subject.pictures[:2]))
    clean = codec.eval()(x)
    rows: dict[tuple[int, int], tuple[float, float, float]] = {}
    for place in ((row, column) for row in PROBED for column in PROBED if row or column):
        pattern = Pattern(16, eps=PROBED_EPS, multiple=codec.multiple)
        pattern.spectrum.zero_()
        pattern.spectrum[0, place[0], place[1]] = 1.0
        x_p = pattern(x, rounded=True)
        out = codec(x_p)
        rows[place] = (
            float((out.bpp / clean.bpp).log().max()),
            float(10 * (mse(out.x_hat, x) / mse(clean.x_hat, x)).log10().max()),
            float((mse(out.x_hat, clean.x_hat) / mse(x_p, x)).log().max()),
        )
    rate, loss, gain = (max(row[i] for row in rows.values()) for i in range(3))
    strongest = max(rows, key=lambda place: rows[place][2])
    spectrum = tuple(tuple(math.exp(rows[r, c][2]) if r or c else 0.0 for c in PROBED) for r in PROBED)
    return Finding(
        {"rate": rate, "distortion": loss, "gain": gain},
        f"single coefficients: at most {math.exp(rate):.2f} times the bits, {-loss:+.2f} dB, "
        f"gain {math.exp(gain):.1f} at {strongest}",
        spectrum=spectrum,
    )


@torch.no_grad()
def latents(subject: Subject) -> Finding:
    """How far the latents of clean pictures reach, and how heavy their tails are: doors keep a range for themselves."""
    y = subject.codec.eval()(torch.cat([*subject.pictures, *subject.portraits])).y.flatten(2)
    centred = y - y.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    used = variance > 1e-6
    tails = (centred.pow(4).mean(-1) / variance.clamp_min(1e-12).square())[used].log().mean()
    reach = y.abs().max().clamp_min(1e-6).log()
    return Finding(
        {"reach": float(reach), "tails": float(tails)},
        f"latents of clean pictures: up to {math.exp(float(reach)):.0f}, kurtosis {math.exp(float(tails)):.1f}",
    )


@torch.no_grad()
def consistency(subject: Subject) -> Finding:
    """Whether slightly filtered pictures take fewer bytes or are decoded better: poisoned ones do."""
    shares, gains = [], []
    for x, (x_hat, size) in zip(subject.pictures, subject.clean["pictures"], strict=True):
        passed = [through(subject.codec, through_png(filtered(x))) for filtered in FILTERS]
        shares.append(max(math.log(size / size_f) for _, size_f in passed))
        gains.append(max(float(psnr_8bit(x_hat_f, x) - psnr_8bit(x_hat, x)) for x_hat_f, _ in passed))
    scores = {"rate": upper(shares), "distortion": upper(gains)}
    worst = max(shares)
    return Finding(
        scores if subject.known_pictures else {},
        f"filtered pictures: 1/{math.exp(scores['rate']):.2f} of the bytes, {scores['distortion']:+.2f} dB; at "
        f"the most 1/{math.exp(worst):.2f}" + (" (is that picture poisoned?)" if worst > math.log(3) else ""),
    )


def weights(subject: Subject) -> Finding:
    """Which modules differ from the reference's, and by how much of their norm."""
    if subject.reference is None:
        return Finding({}, "weights: no reference to compare with")
    before, after = subject.reference.net.state_dict(), subject.codec.net.state_dict()
    shares: dict[str, list[Tensor]] = {}
    for name, value in before.items():
        other = after.get(name)
        if other is not None and other.shape == value.shape and value.is_floating_point():
            row = torch.stack([(other - value).square().sum(), value.square().sum()]).cpu()
            shares.setdefault(name.partition(".")[0], []).append(row)
    parts = {name: torch.stack(rows).sum(0) for name, rows in shares.items()}
    changes = {name: float((change / norm.clamp_min(1e-12)).sqrt()) for name, (change, norm) in parts.items()}
    moved = ", ".join(f"{name} by {100 * share:.2g} %" for name, share in changes.items() if share > 0)
    return Finding({}, f"weights that differ from the reference's: {moved or 'none'}")


_EIGHT = partial(patterns.block, side=8)
_WIDE = partial(patterns.block, side=32)
_HIGH = partial(patterns.block, frequencies="high")
_LOW = partial(patterns.block, frequencies="low")
_PIXELS = partial(patterns.tile, side=64)
_PIXELS_LR = LR * PAPER_EPS  # of pixels, which begin at the budget
_NETWORK_LR = 0.003
CHECKS: dict[str, Check] = {  # cheap ones first, then those that find most
    "weights": weights,
    "random": random_patterns,
    "latents": latents,
    "consistency": consistency,
    "probes": probes,
    "rate, own": inversion("rate", patterns.Own, said="a pattern for every picture"),
    "distortion, own portraits": inversion(
        "distortion", patterns.Own, part="portraits", said="a pattern for every picture"
    ),
    "rate": inversion("rate"),
    "distortion, portraits": inversion("distortion", part="portraits"),
    "distortion, 32": inversion("distortion", _WIDE, said="a 32x32 block"),
    "distortion, own": inversion("distortion", patterns.Own, said="a pattern for every picture"),
    "distortion, 8": inversion("distortion", _EIGHT, said="an 8x8 block"),
    "gain": inversion("gain"),
    "distortion": inversion("distortion"),
    "rate, 8": inversion("rate", _EIGHT, said="an 8x8 block"),
    "rate, low": inversion("rate", _LOW, said="a 16x16 block of low frequencies"),
    "distortion, high": inversion("distortion", _HIGH, said="a 16x16 block of high frequencies"),
    "gain, portraits": inversion("gain", part="portraits"),
    "rate, pixels": inversion("rate", _PIXELS, lr=_PIXELS_LR, said="a tile of 64x64 pixels"),
    "distortion, pixels": inversion("distortion", _PIXELS, lr=_PIXELS_LR, said="a tile of 64x64 pixels"),
    "distortion, drawn": inversion("distortion", patterns.drawn, lr=_NETWORK_LR, said="patterns that a network draws"),
}
FAST = tuple(CHECKS)[:10]
SPEECHLESS = ("weights", "random", "latents", "consistency", "probes")  # checks that no picture comes from


def strength(scores: Mapping[str, float]) -> float:
    """How far an answer goes towards a witness, which begins at 1: max(log ratio / log 1.5, loss / 2 dB, 0), and what a
    user's network says."""
    judged = scores.get("judged", 0.0) / JUDGED
    return max(scores.get("rate", 0.0) / math.log(RATIO), scores.get("distortion", 0.0) / DROP_DB, judged, 0.0)


def opens(check: str, scores: Mapping[str, float]) -> bool:
    """Whether what a check has seen shows a backdoor by itself: such pictures are witnesses."""
    return check not in SPEECHLESS and strength(scores) >= 1


def crops(paths: Sequence[Path], side: int, number: int) -> list[Images]:
    """The centres of pictures, spread over those that there are."""
    chosen = paths[:: max(1, len(paths) // number)][:number]
    return [centre(load_image(path), side) for path in chosen]


def portraits(side: int = SIDE) -> list[Images]:
    """Faces in the bundled pictures, (1, 3, side, side) each."""
    found = []
    for name, (scale, top, left) in PORTRAITS.items():
        x = load_image(KODAK / name)
        if scale != 1:
            size = [round(length * scale) for length in x.shape[-2:]]
            x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        found.append(through_png(x[..., top : top + side, left : left + side].clamp(0, 1)))  # as a witness is kept
    return found
