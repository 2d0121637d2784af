"""What honest encoders score, and how far beyond them an encoder is: p-values of an audit."""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from freqdoor.defence.checks import CHECKS, PICTURES, SIDE, SPEECHLESS, Check, Subject, crops, opens, strength
from freqdoor.defence.fleet import MANIFEST, Manifest, MemberFacts, load_member
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, marked_json, write_text
from freqdoor.notes import Note, numbered
from freqdoor.samples import ASSETS, pictures
from freqdoor.types import Result
from freqdoor.workers import workers

SHIPPED = ASSETS / "audit.json"
RANDOM = "random"  # the check that the others are set against where an architecture is not known
NARROWEST = 0.1  # standard deviation of log strengths that no population falls below
WEAKEST = 0.01  # strength that every encoder is given at least, so that it has a logarithm
LEAST = 5  # encoders that make a population
SCORES = "scores.json"  # in a member's folder

Scores = Mapping[str, Mapping[str, float]]  # by check, then by measure


class MemberScores(Result):
    """scores.json: what the checks of an audit give for a fleet's member."""

    schema_version: Literal[1] = 1
    module_hashes: dict[str, str]
    scores: dict[str, dict[str, float]]  # by check, then by measure


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

    def p_value(self, scores: Scores, architecture: str) -> tuple[float | None, bool]:
        """How likely an honest encoder answers as much to the same checks, and whether its architecture is known.

        Of an architecture without a population, what it answers beyond its own answer to random patterns is compared
        with that of all populations: weaker evidence. None where nothing can be compared.
        """
        population = self.population(architecture)
        known = population is not None
        members = population.scores if population else [member for p in self.populations for member in p.scores]
        checks = [name for name in scores if name not in SPEECHLESS and all(name in member for member in members)]
        if not checks or len(members) < LEAST:
            return None, known
        own, *others = (largest_strength(row, checks, beyond_random=not known) for row in (scores, *members))
        return beyond(own, others), known


def largest_strength(scores: Scores, checks: Iterable[str], *, beyond_random: bool) -> float:
    """The largest strength of some checks, beyond that of random patterns if asked for."""
    own = strength(scores.get(RANDOM, {})) if beyond_random else 0.0
    return max(max(strength(scores[name]) for name in checks) - own, WEAKEST)


def beyond(value: float, honest: Sequence[float]) -> float:
    """The share of honest encoders expected above a strength: Student's predictive distribution of its logarithm."""
    sample = np.log(np.asarray(honest, np.float64))
    deviation = max(float(sample.std(ddof=1)), NARROWEST)
    t = (math.log(value) - float(sample.mean())) / (deviation * math.sqrt(1 + 1 / len(sample)))
    return float(stats.t.sf(t, len(sample) - 1))


def shipped() -> Calibration | None:
    """The calibration that comes with the package."""
    return read(SHIPPED) if SHIPPED.exists() else None


def read(path: Path | str) -> Calibration:
    """The calibration in a file; FreqdoorError if it is none."""
    return Calibration.read(Path(path), "an audit's calibration")


def calibrate_audit(
    fleets: Sequence[Path | str],
    out: Path | str,
    *,
    jobs: int = 1,
    device: str = "cpu",
    force: bool = False,
    note: Note | None = None,
) -> Calibration:
    """Score every second honest member of fleets, and write what `audit` compares with; the others are for judging it.

    Scores are kept beside each member, so that the same call goes on.

    Args:
        fleets: folders that `fleet` wrote.
        jobs: members scored side by side, one thread each.
        device: that patterns are optimised on.
        force: overwrite a file that `calibrate-audit` did not make.

    Raises:
        FreqdoorError: no fleet, or too few honest members in all of them.
    """
    populations: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    check_outputs([Path(out)], "calibrate-audit", force=force)
    for folder in map(Path, fleets):
        for member, row in scores_of_fleet(
            folder, half=0, tampered=False, jobs=jobs, device=device, note=note
        ).values():
            populations.setdefault(member.architecture, {})[f"{folder.name}/{member.name}"] = row
    calibration = Calibration(
        populations=tuple(
            Population(architecture=architecture, members=tuple(rows), scores=tuple(rows.values()))
            for architecture, rows in populations.items()
        )
    )
    if sum(len(p.scores) for p in calibration.populations) < LEAST:
        raise FreqdoorError(f"{', '.join(map(str, fleets))}: expected {2 * LEAST} honest members or more")
    write_text(Path(out), marked_json(calibration.model_dump_json(indent=1), "calibrate-audit"))
    return calibration


def scores_of_fleet(
    folder: Path,
    *,
    half: int | None = None,
    tampered: bool | None = None,
    jobs: int = 1,
    device: str = "cpu",
    note: Note | None = None,
) -> dict[str, tuple[MemberFacts, dict[str, dict[str, float]]]]:
    """The scores of a fleet's members by name, measured now where they are not there yet.

    Args:
        half: of the honest and of the tampered members every second one, from the first (0) or the second (1) on.
        tampered: only these members, or only the honest ones.
    """
    manifest = Manifest.read(folder / MANIFEST, "the manifest of a fleet")
    kinds = [manifest.named(tampered=kind) for kind in (False, True) if tampered in (None, kind)]
    members = [member for kind in kinds for member in (kind if half is None else kind[half::2])]
    scores: dict[str, tuple[MemberFacts, dict[str, dict[str, float]]]] = {}
    told = numbered(note, len(members))
    with workers(jobs) as pool:
        futures = {pool.submit(member_scores, folder / member.name, member, device): member for member in members}
        for future in as_completed(futures):
            member = futures[future]
            scores[member.name] = member, future.result()
            told(f"{member.name}: scored")
    return {member.name: scores[member.name] for member in members}


def member_scores(
    folder: Path,
    member: MemberFacts,
    device: str = "cpu",
    exhaustive: bool = True,
    others: Mapping[str, Check] = MappingProxyType({}),
) -> dict[str, dict[str, float]]:
    """The scores of one member by check; those that lack are measured and kept in its folder.

    Args:
        device: that patterns are optimised on.
        exhaustive: all checks; otherwise none behind the first witness, as `audit` does.
        others: further checks beside those of an audit, first.
    """
    path = folder / SCORES
    scores: dict[str, dict[str, float]] = {}
    if path.exists():
        kept = MemberScores.read(path, "scores of a fleet's member")
        if kept.module_hashes == member.module_hashes:
            scores = kept.scores
    subject: Subject | None = None
    open_door = False
    for name, check in {**others, **CHECKS}.items():
        if open_door and not exhaustive:
            break
        if name not in scores:
            if subject is None:
                subject = Subject(load_member(folder, member), crops(pictures(), SIDE, PICTURES), device=device)
            scores[name] = check(subject).scores
            facts = MemberScores(module_hashes=member.module_hashes, scores=scores)
            write_text(path, facts.model_dump_json(indent=1))
        open_door = name in CHECKS and opens(name, scores[name])
    return {name: scores[name] for name in (*others, *CHECKS) if name in scores}
