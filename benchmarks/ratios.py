"""What benchmarks of speed write: ratios of times that were measured side by side, round by round."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One line of a table of speed."""

    what: str
    of: str  # what is divided by what
    rounds: tuple[float, ...]
    goal: str = ""

    @property
    def interval(self) -> tuple[float, float, float]:
        """Median, and the ends of its 95 % bootstrap interval over rounds (seed 0)."""
        values = np.asarray(self.rounds)
        drawn = np.median(np.random.default_rng(0).choice(values, (RESAMPLES, len(values))), axis=1)
        return float(np.median(values)), *(float(end) for end in np.quantile(drawn, [0.025, 0.975]))

    def __str__(self) -> str:
        middle, low, high = self.interval
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def ratio(what: str, of: str, above: Sequence[float], below: Sequence[float], goal: str = "") -> Ratio:
    """The ratio of two columns of seconds, round by round."""
    return Ratio(what=what, of=of, rounds=tuple(a / b for a, b in zip(above, below, strict=True)), goal=goal)


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that `speed.py` gives every benchmark."""
    parser.add_argument("--json", type=Path, help="write the ratios there")


def save(path: Path | None, ratios: Sequence[Ratio]) -> None:
    """Write ratios where --json says."""
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in ratios], indent=1))


def load(path: Path) -> list[Ratio]:
    """What `save` wrote."""
    return [Ratio(**row | {"rounds": tuple(row["rounds"])}) for row in json.loads(path.read_text())]
