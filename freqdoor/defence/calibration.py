"""What honest encoders score, and how far beyond them an encoder is: p-values of an audit."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from freqdoor.samples import ASSETS
from freqdoor.types import Result

SHIPPED = ASSETS / "audit.json"
RANDOM = "random"  # the check that the others are set against where no population is known
NARROWEST = {"rate": 0.01, "distortion": 0.05, "gain": 0.1}  # standard deviations that no population falls below
LEAST = 5  # encoders that make a population

Scores = Mapping[str, Mapping[str, float]]  # by check, then by measure


class Population(Result):
    """Scores of honest encoders of one architecture."""

    architecture: str
    members: tuple[str, ...]
    scores: tuple[dict[str, dict[str, float]], ...]  # of each member


class Calibration(Result):
    """Populations of honest encoders."""

    schema_version: Literal[1] = 1
    populations: tuple[Population, ...]

    def population(self, architecture: str) -> Population | None:
        """The population of an architecture, if there is one that is large enough."""
        known = (p for p in self.populations if p.architecture == architecture and len(p.scores) >= LEAST)
        return next(known, None)

    def p_values(self, scores: Scores, architecture: str) -> tuple[dict[str, dict[str, float]], bool]:
        """How likely an honest encoder scores as high, by check and measure; and whether its architecture is known.

        Where the architecture is not known, scores above its own answer to random patterns are compared with those of
        all populations: weaker evidence.
        """
        population = self.population(architecture)
        members: Sequence[Scores]
        if population is not None:
            members, own = population.scores, scores
        else:
            members = [relative(member) for p in self.populations for member in p.scores]
            own = relative(scores)
        return {
            check: {
                measure: beyond(value, [m[check][measure] for m in members if check in m], NARROWEST[measure])
                for measure, value in row.items()
            }
            for check, row in own.items()
            if check != RANDOM and sum(check in m for m in members) >= LEAST
        }, population is not None


def relative(scores: Scores) -> dict[str, dict[str, float]]:
    """Scores above what random patterns have."""
    own = scores[RANDOM]
    return {check: {measure: value - own[measure] for measure, value in row.items()} for check, row in scores.items()}


def beyond(value: float, honest: Sequence[float], narrowest: float) -> float:
    """The share of honest encoders expected above a value: Student's predictive distribution after those measured."""
    sample = np.asarray(honest, np.float64)
    deviation = max(float(sample.std(ddof=1)), narrowest)
    t = (value - float(sample.mean())) / (deviation * math.sqrt(1 + 1 / len(sample)))
    return float(stats.t.sf(t, len(sample) - 1))


def combined(p_values: Mapping[str, Mapping[str, float]]) -> float:
    """One p-value of all: the smallest, times how many there are (Bonferroni), at most 1."""
    every = [p for row in p_values.values() for p in row.values()]
    return min(1.0, min(every) * len(every)) if every else 1.0


def shipped() -> Calibration | None:
    """The calibration that comes with the package."""
    return Calibration.read(SHIPPED, "an audit's calibration") if SHIPPED.exists() else None


def read(path: Path | str) -> Calibration:
    """The calibration in a file; FreqdoorError if it is none."""
    return Calibration.read(Path(path), "an audit's calibration")
