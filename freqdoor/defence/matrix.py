"""`freqdoor reproduce defence`: attacks by defences, over fleets of encoders; published detectors beside ours."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest  # type: ignore[import-untyped]

from freqdoor.attack.planted import Planted, load_planted
from freqdoor.attack.settings import OBJECTIVES
from freqdoor.codecs.loading import load_codec
from freqdoor.data import centre, load_image
from freqdoor.defence.audit import Verdict, verdict_of
from freqdoor.defence.calibration import LEAST, SCORES, Calibration, Population, member_scores
from freqdoor.defence.checks import DROP_DB, RATIO, opens
from freqdoor.defence.comparators import COMPARATORS, spectral_scores, strip_scores, teco_scores
from freqdoor.defence.expectation import calibrate_guard
from freqdoor.defence.fleet import CROP, MANIFEST, Manifest, MemberFacts, load_member
from freqdoor.defence.guard import GuardCounts, guard_rates
from freqdoor.defence.repair import RepairRow, repair, repair_row
from freqdoor.errors import FreqdoorError
from freqdoor.files import write_text
from freqdoor.measure.records import poisoned
from freqdoor.notes import Note, numbered
from freqdoor.samples import KODAK, held_out, pictures
from freqdoor.training.train import EXPORT
from freqdoor.types import Result
from freqdoor.workers import Runner, workers

STRENGTHS = (1.0, 2.0, 3.0)
BUNDLED_KIND = "lite-hyperprior"  # the architecture that guard and repair are measured on
OVERLAYS = 6  # pictures of the vanilla half that STRIP lays over others
RESAMPLES = 2000
GUARD, REPAIR = "guard.json", "repair.json"  # in a member's folder


class Judged(Result):
    """What the audit says of one encoder, from its scores alone."""

    fleet: str
    name: str
    family: str
    architecture: str
    tampered: bool
    calibrated: bool  # in the calibration's half, so that it is not judged by it
    known: bool  # whether its architecture has a population
    p_value: float | None  # of an honest encoder that answers as much to the same checks
    witness: str | None  # the check that a witness comes from
    verdict: Verdict
    norm: float | None  # Neural Cleanse's score


class MemberGuard(Result):
    """guard.json: what the guard, and published detectors of images, make of one encoder's trigger."""

    schema_version: Literal[1] = 1
    module_hashes: dict[str, str]
    clean: GuardCounts
    poisoned: dict[str, GuardCounts]  # by strength
    acted: dict[str, GuardCounts]  # of those, the images that the trigger acted on
    detectors: dict[str, float]  # AUC of poisoned against clean images, by detector


class MemberRepair(Result):
    """repair.json: one encoder before and after its repair."""

    schema_version: Literal[1] = 1
    module_hashes: dict[str, str]
    before: RepairRow
    after: RepairRow


class Interval(Result):
    """A value with its 95 % bootstrap interval over encoders."""

    value: float
    low: float
    high: float
    number: int  # encoders

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class DefenceMatrix(Result):
    """defence.json."""

    schema_version: Literal[1] = 1
    judged: tuple[Judged, ...]
    guards: dict[str, MemberGuard]  # by fleet/member
    repairs: dict[str, MemberRepair]
    failed: tuple[str, ...]  # plantings whose trigger does nothing: no backdoors, and measured nowhere
    late: bool  # whether time was up before all was measured
    hours: float


def auc(tampered: ArrayLike, honest: ArrayLike) -> float:
    """The share of pairs in which the tampered one scores higher; ties count half."""
    a, b = np.asarray(tampered)[:, None], np.asarray(honest)[None]
    return float(((a > b) + 0.5 * (a == b)).mean())


def auc_interval(tampered: Sequence[float], honest: Sequence[float]) -> Interval:
    """`auc` with a bootstrap interval: both sets of encoders are drawn again, with seed 0."""
    generator = np.random.default_rng(0)
    a, b = np.asarray(tampered), np.asarray(honest)
    drawn_a = generator.choice(a, (RESAMPLES, len(a), 1))
    drawn_b = generator.choice(b, (RESAMPLES, 1, len(b)))
    draws = ((drawn_a > drawn_b) + 0.5 * (drawn_a == drawn_b)).mean((1, 2))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value=auc(a, b), low=float(low), high=float(high), number=len(a))


def share_interval(hits: int, number: int) -> Interval:
    """A share with the exact (Clopper-Pearson) 95 % interval."""
    exact = binomtest(hits, number).proportion_ci(0.95, method="exact")
    return Interval(value=hits / number, low=float(exact.low), high=float(exact.high), number=number)


def suspicion(judged: Judged) -> float:
    """What encoders are ranked by: -log10 of the p-value, and above all others where there is a witness."""
    p = 1.0 if judged.p_value is None else judged.p_value
    return -math.log10(max(p, 1e-300)) + (1000.0 if judged.witness else 0.0)


def acts(member: MemberFacts) -> bool:
    """Whether some trigger of a member takes 1.5 times the bytes or 2 dB on the fleet's pictures.

    Attacks on downstream networks (Eq. (8)) are taken to act: their effect is not in bytes or dB.
    """
    planned: Any = member.settings.get("attacks") or [member.settings]
    objectives = [part["objective"]["name"] for part in planned if isinstance(part, dict) and "objective" in part]
    if any(name in OBJECTIVES and OBJECTIVES[name].uses_auxiliary for name in objectives):
        return True
    return any(
        answer.bpp >= RATIO * member.clean.bpp or answer.psnr_db <= member.clean.psnr_db - DROP_DB
        for answer in member.poisoned.values()
    )


def judge(fleets: Mapping[str, Manifest], scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Judged]:
    """Every encoder by the population of every second honest one of its architecture, or by the weaker evidence.

    Args:
        fleets: manifests by name.
        scores: of every "fleet/member", by check.
    """
    halves = {
        f"{fleet}/{member.name}"
        for fleet, manifest in fleets.items()
        for member in manifest.named(tampered=False)[0::2]
    }
    members = {f"{fleet}/{m.name}": (fleet, m) for fleet, manifest in fleets.items() for m in manifest.members}
    populations: dict[str, list[str]] = {}
    for key in halves & scores.keys():
        populations.setdefault(members[key][1].architecture, []).append(key)
    largest = max(populations, key=lambda name: len(populations[name]))  # others stand for what was never calibrated
    if len(populations[largest]) < LEAST:
        raise FreqdoorError(f"fleets: expected {2 * LEAST} honest encoders of one architecture or more")
    names = sorted(populations[largest])
    calibration = Calibration(
        populations=(
            Population(architecture=largest, members=tuple(names), scores=tuple(dict(scores[n]) for n in names)),
        )
    )
    rows = []
    for key, row in scores.items():
        fleet, member = members[key]
        own = {name: values for name, values in row.items() if name not in COMPARATORS}
        p, known = calibration.p_value(own, member.architecture)
        witness = next((name for name, values in own.items() if opens(name, values)), None)
        rows.append(
            Judged(
                fleet=fleet,
                name=member.name,
                family=member.family,
                architecture=member.architecture,
                tampered=member.tampered,
                calibrated=key in names,
                known=known,
                p_value=p,
                witness=witness,
                verdict=verdict_of(bool(witness), p, known)[0],
                norm=row.get("Neural Cleanse", {}).get("norm"),
            )
        )
    return rows


def defence_matrix(
    fleets: Path | str,
    *,
    jobs: int = 1,
    runner: Runner = "local",
    budget: float | None = None,
    note: Note | None = None,
) -> DefenceMatrix:
    """Audit, guard and repair on every fleet in a folder; what a member's folder keeps is not measured again.

    Args:
        fleets: a folder of folders that `freqdoor fleet` wrote.
        jobs: members measured side by side, one thread each.
        runner: where (`workers`).
        budget: minutes after which no member is begun.

    Raises:
        FreqdoorError: no fleet there, or too few honest encoders.
    """
    root, started = Path(fleets), time.monotonic()
    until = time.time() + 60 * budget if budget is not None else math.inf
    manifests = {
        path.parent.name: Manifest.read(path, "the manifest of a fleet") for path in sorted(root.glob(f"*/{MANIFEST}"))
    }
    if not manifests:
        raise FreqdoorError(f"{root}: expected folders that `freqdoor fleet` wrote, found no {MANIFEST} in any")
    every = {f"{fleet}/{m.name}": m for fleet, manifest in manifests.items() for m in manifest.members}
    members = {key: m for key, m in every.items() if not m.tampered or acts(m)}
    planted = {key: m for key, m in members.items() if m.tampered and m.architecture == BUNDLED_KIND}
    first = {m.family: key for key, m in reversed(planted.items())}  # of each family, what is repaired
    repaired = {key: members[key] for key in first.values()}
    with workers(jobs, runner) as pool:
        scores = _each(_audited, SCORES, root, members, pool, until, note)
        guards = _each(member_guard, GUARD, root, planted, pool, until, note)
        repairs = _each(member_repair, REPAIR, root, repaired, pool, until, note)
    return DefenceMatrix(
        judged=tuple(judge(manifests, scores)),
        guards=guards,
        repairs=repairs,
        failed=tuple(key for key in every if key not in members),
        late=len(scores) < len(members) or len(guards) < len(planted) or len(repairs) < len(repaired),
        hours=(time.monotonic() - started) / 3600,
    )


T = TypeVar("T")
Kept = TypeVar("Kept", MemberGuard, MemberRepair)


def _each(
    measure: Callable[[Path, MemberFacts], T],
    kept: str,
    root: Path,
    members: Mapping[str, MemberFacts],
    pool: Executor,
    until: float,
    note: Note | None,
) -> dict[str, T]:
    """What a measurement gives for every member, by workers.

    Members that time does not reach are left out, unless their folder has the file that is kept.
    """
    found: dict[str, T] = {}
    told = numbered(note, len(members))
    futures = {pool.submit(_in_time, measure, kept, root / key, member, until): key for key, member in members.items()}
    for future in as_completed(futures):
        result = future.result()
        if result is not None:
            found[futures[future]] = result
            told(f"{futures[future]}: {measure.__name__.strip('_')}")
    return {key: found[key] for key in members if key in found}


def _in_time(
    measure: Callable[[Path, MemberFacts], T], kept: str, folder: Path, member: MemberFacts, until: float
) -> T | None:
    return measure(folder, member) if time.time() < until or (folder / kept).exists() else None


def _audited(folder: Path, member: MemberFacts) -> dict[str, dict[str, float]]:
    return member_scores(folder, member, exhaustive=False, others=COMPARATORS)


def member_guard(folder: Path, member: MemberFacts) -> MemberGuard:
    """What the guard and published detectors make of a member's trigger, on the pictures that are held out."""
    path = folder / GUARD
    if (kept := _kept(MemberGuard, path, member)) is not None:
        return kept
    codec, planted = load_member(folder, member), _planted(folder, member)
    clean = [centre(load_image(p), CROP) for p in held_out()]
    others = [centre(load_image(p), CROP) for p in pictures() if p not in held_out()][:OVERLAYS]
    marked = {
        strength: [poisoned(trigger, x, strength=strength) for trigger in planted.triggers.values() for x in clean]
        for strength in STRENGTHS
    }
    own = calibrate_guard(planted.vanilla, KODAK, folder / "guard-calibration.json") if member.base else None
    rates = {
        f"{strength:g}": guard_rates(codec, own, clean, images, paired=True) for strength, images in marked.items()
    }
    every = [*clean, *marked[1.0]]
    of_images = {
        "STRIP": strip_scores(codec, every, others),
        "TeCo": teco_scores(codec, every),
        "spectral signatures": spectral_scores(codec, every),
    }
    result = MemberGuard(
        module_hashes=member.module_hashes,
        clean=rates["1"].clean,
        poisoned={strength: row.poisoned for strength, row in rates.items()},
        acted={strength: row.acted for strength, row in rates.items() if row.acted is not None},
        detectors={name: auc(values[len(clean) :], values[: len(clean)]) for name, values in of_images.items()},
    )
    write_text(path, result.model_dump_json(indent=1))
    return result


def member_repair(folder: Path, member: MemberFacts) -> MemberRepair:
    """A member before and after `repair` with its defaults, with the triggers that it was planted with."""
    path = folder / REPAIR
    if (kept := _kept(MemberRepair, path, member)) is not None:
        return kept
    planted = _planted(folder, member)
    before = repair_row("tampered", planted.tampered, planted, STRENGTHS)
    result = repair(load_member(folder, member), folder / "repair", fast=True)
    after = repair_row("repaired", load_codec(str(folder / "repair" / EXPORT)), planted, STRENGTHS, result)
    repaired = MemberRepair(module_hashes=member.module_hashes, before=before, after=after)
    write_text(path, repaired.model_dump_json(indent=1))
    return repaired


def _kept(kind: type[Kept], path: Path, member: MemberFacts) -> Kept | None:
    """What was measured of a member before, if it is still the same encoder."""
    found = kind.read(path, "what was measured of a fleet's member") if path.exists() else None
    return found if found is not None and found.module_hashes == member.module_hashes else None


def _planted(folder: Path, member: MemberFacts) -> Planted:
    """The member's own triggers beside its encoder."""
    base = member.base
    return load_planted(folder, str(folder.parent / base / EXPORT) if base else None)
