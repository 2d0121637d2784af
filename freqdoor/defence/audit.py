"""`freqdoor audit`: does an encoder carry a backdoor? Scores, witnesses, one verdict, as JSON and as a page."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from freqdoor.attack.networks import load_network
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.loading import file_of, load_codec
from freqdoor.data import encoded, image_paths, usable_images
from freqdoor.defence.bom import as_bom
from freqdoor.defence.calibration import Calibration, read, shipped
from freqdoor.defence.checks import (
    CHECKS,
    DROP_DB,
    FAST,
    PICTURES,
    PROBED,
    RATIO,
    SIDE,
    SPEECHLESS,
    Finding,
    Response,
    Subject,
    Witness,
    crops,
    opens,
    strength,
)
from freqdoor.defence.judges import judged_by
from freqdoor.defence.pipelines import Level, Line, Looked, check_targets, written
from freqdoor.files import marked_json, write_together
from freqdoor.measure.report import photo, render
from freqdoor.notes import Count, Note
from freqdoor.samples import KODAK
from freqdoor.training.loop import check_device
from freqdoor.training.run import Environment, environment
from freqdoor.types import Result

RESULT, PAGE = "audit.json", "audit.html"
LEVEL = 0.01  # the false-alarm rate: below it an encoder without a witness is called tampered
DOUBT = 0.05  # and below this one nothing is decided
Verdict = Literal["clean", "tampered", "undecided"]
LEVELS: dict[Verdict, Level] = {"clean": "none", "tampered": "error", "undecided": "warning"}
EXIT_CODES: dict[Verdict, int] = {"clean": 0, "tampered": 1, "undecided": 2}


class SeenWitness(Result):
    """A witness as files: two pictures beside the page, and what the codec makes of them."""

    check: str
    clean: str  # file's name
    patterned: str
    response: Response


class CheckResult(Result):
    """What one check has seen."""

    check: str
    said: str
    scores: dict[str, float]
    strength: float | None  # how far it goes towards a witness, which begins at 1; None of checks that have none
    seconds: float
    spectrum: tuple[tuple[float, ...], ...] = ()  # gain of every single coefficient that was tried, row by row


class Audit(Result):
    """audit.json."""

    schema_version: Literal[1] = 1
    codec: str
    architecture: str
    verdict: Verdict
    reason: str
    p_value: float | None  # of an honest encoder that answers as much to these checks; None without a population
    calibrated: bool  # whether the architecture has a population of its own
    modules: dict[str, str] = Field(default_factory=dict)  # SHA-256 of each; none in files of older versions
    changed: tuple[str, ...] | None  # modules that differ from the reference's
    checks: tuple[CheckResult, ...]
    witnesses: tuple[SeenWitness, ...]
    seconds: float
    environment: Environment

    @property
    def exit_code(self) -> int:
        """What `freqdoor audit` ends with."""
        return EXIT_CODES[self.verdict]


def audit(
    checkpoint: Codec | str,
    *,
    weights: Path | str | None = None,
    reference: Codec | str | None = None,
    images: Path | str | Sequence[Path] = KODAK,
    fast: bool = False,
    exhaustive: bool = False,
    device: str = "cpu",
    networks: Sequence[str] = (),
    out: Path | str | None = None,
    calibration: Calibration | Path | str | None = None,
    sarif: Path | str | None = None,
    junit: Path | str | None = None,
    bom: Path | str | None = None,
    seed: int = 0,
    force: bool = False,
    note: Note | None = None,
) -> Audit:
    """Look for a backdoor in a codec's encoder; with `out` write audit.json, audit.html and the witnesses' pictures.

    Args:
        checkpoint, weights: the codec under test, as for `load_codec`, or a loaded codec.
        reference: the codec that it should be, if there is one to compare with.
        images: what patterns are made on; by default the bundled Kodak pictures.
        fast: only the checks that find most.
        exhaustive: go on with further checks once there is a witness.
        device: that patterns are optimised on.
        networks: what decoded pictures are for, as for `load_network`: one more check each, before the others.
        calibration: of honest encoders; by default the one that comes with the package.
        sarif, junit: files to write in these formats, for build systems.
        bom: a CycloneDX file to write, with the codec and the verdict on it.
        force: overwrite files of these names that `audit` did not make.

    Raises:
        FreqdoorError: a codec or images that cannot be used, or an unwritable folder.
    """
    started = time.monotonic()
    codec = checkpoint if isinstance(checkpoint, Codec) else load_codec(checkpoint, weights)
    known = load_codec(reference) if isinstance(reference, str) else reference
    paths = usable_images(image_paths(images), min_side=SIDE)
    given = codec.spec.name if isinstance(checkpoint, Codec) else checkpoint
    file = Path(weights) if weights is not None else None if isinstance(checkpoint, Codec) else file_of(given)
    pages = [] if out is None else [Path(out) / RESULT, Path(out) / PAGE]
    targets = [*pages, *(Path(path) for path in (sarif, junit, bom) if path is not None)]
    check_targets(targets, file, "audit", force=force)
    population = read(calibration) if isinstance(calibration, Path | str) else calibration or shipped()
    check_device(device)
    judges = [load_network(network) for network in networks]
    subject = Subject(
        codec.prepare(),
        crops(paths, SIDE, PICTURES),
        reference=known,
        seed=seed,
        device=device,
        known_pictures=images == KODAK,
    )
    findings: dict[str, tuple[Finding, float]] = {}
    checks = {f"judged by {network.name}": judged_by(network) for network in judges}
    checks |= {name: CHECKS[name] for name in (FAST if fast else CHECKS)}
    for number, (name, check) in enumerate(checks.items()):
        if note:
            note(Count(f"check: {name}", number, len(checks)))
        begun = time.monotonic()
        finding = check(subject)
        findings[name] = finding, time.monotonic() - begun
        if opens(name, finding.scores) and not exhaustive:
            break
    result, shown = _judged(subject, findings, population, time.monotonic() - started)
    looked = Looked("audit", given, file, _lines(result, out), result.exit_code, result.verdict)
    contents = written(looked, sarif, junit)
    if bom is not None:
        contents[Path(bom)] = as_bom(looked, result.architecture, result.reason, result.modules)
    if out is not None:
        contents |= _pages(Path(out), result, shown)
    write_together(contents)
    return result


def _lines(result: Audit, out: Path | str | None) -> list[Line]:
    """What was looked at: the checks, and where there is no witness the comparison with honest encoders."""
    pictures = {
        row.check: tuple(str(Path(out) / name) for name in (row.clean, row.patterned)) if out is not None else ()
        for row in result.witnesses
    }
    lines = [
        Line(
            f"backdoor: {row.check}",
            "error" if row.check in pictures else "none",
            row.said,
            seconds=row.seconds,
            pictures=pictures.get(row.check, ()),
        )
        for row in result.checks
    ]
    return lines if pictures else [*lines, Line("backdoor", LEVELS[result.verdict], result.reason)]


def _judged(
    subject: Subject, findings: dict[str, tuple[Finding, float]], population: Calibration | None, seconds: float
) -> tuple[Audit, list[tuple[str, Witness]]]:
    """The verdict, and the witnesses that are shown."""
    codec = subject.codec
    scores = {name: finding.scores for name, (finding, _) in findings.items()}
    p, calibrated = population.p_value(scores, codec.spec.architecture) if population else (None, False)
    shown = [
        (name, max(finding.witnesses, key=lambda w: max(w.response.ratio / RATIO, w.response.drop_db / DROP_DB)))
        for name, (finding, _) in findings.items()
        if opens(name, finding.scores)
    ]
    verdict, reason = verdict_of(bool(shown), p, calibrated)
    changed = None
    if subject.reference is not None:
        before, after = subject.reference.module_hashes(), codec.module_hashes()
        changed = tuple(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if changed and set(changed) <= {"g_a", "h_a"}:
            reason += "; only the encoder differs from the reference's, as after planting or training it alone"
    return Audit(
        codec=codec.spec.name,
        architecture=codec.spec.architecture,
        verdict=verdict,
        reason=reason,
        p_value=p,
        calibrated=calibrated,
        modules=codec.module_hashes(),
        changed=changed,
        checks=tuple(
            CheckResult(
                check=name,
                said=finding.said,
                scores=finding.scores,
                strength=None if name in SPEECHLESS else strength(finding.scores),
                seconds=spent,
                spectrum=finding.spectrum,
            )
            for name, (finding, spent) in findings.items()
        ),
        witnesses=tuple(
            SeenWitness(
                check=name, clean=f"witness-{i}-clean.png", patterned=f"witness-{i}.png", response=witness.response
            )
            for i, (name, witness) in enumerate(shown, 1)
        ),
        seconds=seconds,
        environment=environment(),
    ), shown


def verdict_of(witnessed: bool, p: float | None, calibrated: bool) -> tuple[Verdict, str]:
    """The verdict and its reason, from whether there is a witness and how likely an honest encoder scores as high."""
    weaker = "" if calibrated else "; its architecture was never calibrated, so that this is weaker evidence"
    if witnessed:
        return "tampered", "a pattern that nobody sees changes what it writes: the witness shows it"
    if p is None:
        return "undecided", "no witness was found, and there is no population of honest encoders to compare with"
    if p < LEVEL:
        return (
            "tampered",
            f"one honest encoder in {1 / max(p, 1e-12):.0f} answers to patterns as much (p = {p:.2g}){weaker}",
        )
    if p < DOUBT:
        return "undecided", f"few honest encoders answer to patterns as much (p = {p:.2g}){weaker}"
    return "clean", f"it answers to patterns as honest encoders do (p = {p:.2g}){weaker}"


def _pages(out: Path, result: Audit, shown: Sequence[tuple[str, Witness]]) -> dict[Path, str | bytes]:
    """The contents of audit.json, audit.html and the witnesses' pictures."""
    contents: dict[Path, str | bytes] = {}
    pictures = []
    for seen, (_, witness) in zip(result.witnesses, shown, strict=True):
        contents[out / seen.clean] = encoded(out / seen.clean, witness.x, "audit")
        contents[out / seen.patterned] = encoded(out / seen.patterned, witness.x_p, "audit")
        pictures.append((seen, photo(witness.x), photo(witness.x_p)))
    contents[out / PAGE] = render("audit.html", result=result, pictures=pictures, probed=PROBED)
    contents[out / RESULT] = marked_json(result.model_dump_json(indent=1), "audit")
    return contents
