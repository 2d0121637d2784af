"""What an audit looks at: each check is one function and one line in CHECKS.

A check gives scores: numbers that are larger the more suspicious an encoder is, and that honest encoders have in a
narrow range. What is far outside is told by a population (`calibration`), and where there is none by the encoder's own
answer to random patterns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from freqdoor.codecs.adapter import Codec
from freqdoor.data import centre, load_image, seed_for
from freqdoor.defence.inversion import inverted
from freqdoor.measure.records import poisoned, through
from freqdoor.metrics import mse, psnr_8bit
from freqdoor.triggers.arguments import PAPER_EPS, Goal
from freqdoor.triggers.pattern import Pattern
from freqdoor.types import Images, Result

SIDE, PICTURES = 128, 4  # of the crops that patterns are made on
NOISES = 4  # random patterns that an encoder's own answer is taken from


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
    reference: Codec | None = None
    seed: int = 0

    @cached_property
    def x(self) -> Images:
        """All pictures, (b, 3, h, w)."""
        return torch.cat(list(self.pictures))

    @cached_property
    def clean(self) -> list[tuple[Images, int]]:
        """What is decoded of every clean picture, and its bytes."""
        return [through(self.codec, x) for x in self.pictures]

    def respond(self, pattern: Pattern) -> list[Witness]:
        """The answer to a pattern on every picture, as 8-bit files."""
        witnesses = []
        for x, (x_hat, size) in zip(self.pictures, self.clean, strict=True):
            x_p = poisoned(pattern, x)
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

    scores: dict[str, float]  # by measure, as `MEASURES`
    said: str
    witnesses: Sequence[Witness] = ()


Check = Callable[[Subject], Finding]


def scores_of(witnesses: Sequence[Witness]) -> dict[str, float]:
    """Three scores of one pattern, means over pictures: log of the ratio of bytes, loss in dB, log of the gain."""
    responses = [witness.response for witness in witnesses]

    def mean(values: Iterator[float]) -> float:
        return sum(values) / len(responses)

    return {
        "rate": mean(math.log(r.ratio) for r in responses),
        "distortion": mean(r.drop_db for r in responses),
        "gain": mean(math.log(max(r.gain, 1e-12)) for r in responses),
    }


def inversion(goal: Goal, block: int = 16, frequencies: str = "all") -> Check:
    """The check that inverts the encoder for a goal."""

    def check(subject: Subject) -> Finding:
        pattern = inverted(subject.codec, subject.x, goal, block=block, frequencies=frequencies, seed=subject.seed)
        witnesses = subject.respond(pattern)
        scores = scores_of(witnesses)
        return Finding(
            scores,
            f"a {block}x{block} pattern ({frequencies} frequencies) made for {goal}: "
            f"{math.exp(scores['rate']):.2f} times the bytes, {-scores['distortion']:+.2f} dB, "
            f"gain {math.exp(scores['gain']):.1f}",
            witnesses,
        )

    return check


def random_patterns(subject: Subject) -> Finding:
    """How the encoder answers to random patterns of equal strength: what the other scores are set against."""
    rows = []
    for i in range(NOISES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(subject.seed, "random pattern", i))
            pattern = Pattern(16, ("low", "mid", "high", "all")[i % 4], eps=PAPER_EPS, multiple=subject.codec.multiple)
        rows.append(scores_of(subject.respond(pattern.eval())))
    scores = {measure: max(row[measure] for row in rows) for measure in rows[0]}
    return Finding(scores, f"random patterns: gain at most {math.exp(scores['gain']):.1f}")


CHECKS: dict[str, Check] = {
    "random": random_patterns,
    "distortion": inversion("distortion"),
    "gain": inversion("gain"),
    "rate": inversion("rate"),
    "rate, low": inversion("rate", 16, "low"),
    "gain, 8": inversion("gain", 8),
    "gain, 32": inversion("gain", 32),
    "distortion, high": inversion("distortion", 16, "high"),
}
FAST = ("random", "distortion", "gain", "rate")


def crops(paths: Sequence[Path], side: int, number: int) -> list[Images]:
    """The centres of pictures, spread over those that there are."""
    chosen = paths[:: max(1, len(paths) // number)][:number]
    return [centre(load_image(path), side) for path in chosen]
