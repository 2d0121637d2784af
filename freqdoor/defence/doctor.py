"""`freqdoor doctor`: what is wrong with a codec's checkpoint, in plain words, and what to do; all of it in one run."""

import copy
from pathlib import Path
from typing import Literal

from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.architectures import ARCHITECTURES, parse_name
from freqdoor.codecs.loading import file_of, named, save_codec
from freqdoor.defence.behaviour import Behaviour, try_out
from freqdoor.defence.checkpoint import Patient, looks, numbers, read_file, tables, with_weights
from freqdoor.defence.pipelines import Level, Line, Looked, check_targets, written
from freqdoor.defence.symptoms import KINDS, Severity, Symptom
from freqdoor.files import mark, marked_json, write_together
from freqdoor.notes import Note
from freqdoor.training.run import Environment, environment
from freqdoor.types import Result

LEVELS: dict[Severity, Level] = {"fatal": "error", "wrong": "warning", "note": "note"}
BLOCKING = ("not-finite", "absurd-tables", "protocol")  # what a codec cannot be run with


class Diagnosis(Result):
    """What was found in a checkpoint: report.json."""

    schema_version: Literal[1] = 1
    checkpoint: str  # as it was given
    weights: str | None = None
    architecture: str | None  # None where there is no codec
    symptoms: tuple[Symptom, ...]
    behaviour: Behaviour | None  # what was measured on pictures; None where the codec could not be run
    unexamined: str | None = None  # what could not be looked at
    mended: tuple[str, ...] = ()  # what `fix` mended
    fix: str | None = None  # what became of `fix`
    environment: Environment

    @property
    def judged(self) -> bool:
        """Whether there was a codec to judge."""
        return all(KINDS[row.what].judged for row in self.symptoms)

    @property
    def healthy(self) -> bool:
        """Whether there is nothing but notes."""
        return all(row.severity == "note" for row in self.symptoms)

    @property
    def exit_code(self) -> int:
        """0 healthy, or mended by `fix`; 1 something is wrong; 2 it cannot be judged."""
        if not self.judged:
            return 2
        return 0 if self.healthy or self.mended else 1

    @property
    def verdict(self) -> str:
        """The diagnosis in one sentence."""
        if not self.judged:
            return "cannot be judged"
        wrong = sum(row.severity != "note" for row in self.symptoms)
        notes = len(self.symptoms) - wrong
        said = f"{wrong} thing{'s' * (wrong != 1)} wrong" if wrong else "healthy"
        return said + (f", {notes} note{'s' * (notes != 1)}" if notes else "")


def doctor(
    checkpoint: Codec | str | Path,
    weights: Path | str | None = None,
    *,
    out: Path | None = None,
    fix: Path | None = None,
    sarif: Path | None = None,
    junit: Path | None = None,
    force: bool = False,
    note: Note | None = None,
) -> Diagnosis:
    """What is wrong with a codec's checkpoint: its file, weights, coding tables, and what it does on bundled pictures.

    Nothing that a file contains is run.

    Args:
        checkpoint: as `load_codec` takes it.
        weights: a file to look at instead; the checkpoint then names what it should be.
        out: a JSON file to write.
        fix: a safetensors file to write the mended codec to, if everything that is wrong can be mended without
            training; see `Diagnosis.fix`.
        sarif, junit: files to write in these formats, for build systems.
        force: overwrite files that this verb did not make.

    Raises:
        FreqdoorError: no such file or name, or files that cannot be written.
    """
    name = checkpoint.spec.name if isinstance(checkpoint, Codec) else str(checkpoint)
    path = Path(weights) if weights is not None else None if isinstance(checkpoint, Codec) else file_of(name)
    targets = [target for target in (out, fix, sarif, junit) if target is not None]
    check_targets(targets, path, "doctor", force=force)
    if note:
        note("reading the file")
    patient = _patient(checkpoint if isinstance(checkpoint, Codec) else name, weights, path)
    found, behaviour, unexamined = list(patient.found), None, None
    if patient.net is not None:
        found += looks(patient.net, patient.raw)
    if patient.codec is not None:
        found += tables(patient.codec, patient.raw, keep=patient.keeps_tables)
    if patient.codec is not None and not any(row.what in BLOCKING for row in found):
        if note:
            note("running it on pictures")
        more, behaviour = try_out(patient.codec)
        found += more
    elif patient.codec is not None:
        unexamined = "what it does on pictures"
    elif patient.net is not None:
        unexamined = "its coding tables, and what it does on pictures"
    else:
        unexamined = "what its weights look like, its coding tables, and what it does on pictures"
    mended, said = _fix(patient.codec, found, fix) if fix is not None else ((), None)
    result = Diagnosis(
        checkpoint=name,
        weights=None if weights is None else str(weights),
        architecture=patient.architecture,
        symptoms=tuple(found),
        behaviour=behaviour,
        unexamined=unexamined,
        mended=mended,
        fix=said,
        environment=environment(),
    )
    looked = Looked("doctor", name, path, _lines(result), result.exit_code, result.verdict)
    contents = written(looked, sarif, junit)
    if out is not None:
        contents[out] = marked_json(result.model_dump_json(indent=1), "doctor")
    write_together(contents)
    return result


def _lines(result: Diagnosis) -> list[Line]:
    """What is wrong and was not mended, and where nothing is, that."""
    lines = [
        Line(row.what, "note" if row.what in result.mended else LEVELS[row.severity], row.said, row.remedy, row.where)
        for row in result.symptoms
    ]
    return [*lines, Line("codec", "none", result.verdict)] if result.healthy else lines


def _patient(checkpoint: Codec | str, weights: Path | str | None, path: Path | None) -> Patient:
    if path is not None:
        name = checkpoint.spec.name if isinstance(checkpoint, Codec) else checkpoint
        return read_file(path, None if weights is None else name)
    if isinstance(checkpoint, str):
        spec = parse_name(checkpoint)
        if spec.architecture not in ARCHITECTURES:
            return with_weights(spec, None, [])
    codec = copy.deepcopy(checkpoint) if isinstance(checkpoint, Codec) else named(checkpoint)
    raw = codec.net.state_dict()
    return Patient(codec.spec.architecture, codec.net, codec, raw, list(numbers(raw)), keeps_tables=True)


def _fix(codec: Codec | None, found: list[Symptom], path: Path) -> tuple[tuple[str, ...], str]:
    """Write the mended codec if that mends all that is wrong; what was mended, and what became of it."""
    rest = [row.what for row in found if row.severity != "note" and not row.mended]
    mended = tuple(dict.fromkeys(row.what for row in found if row.mended))
    if codec is None or rest:
        return (
            (),
            f"nothing was written: {', '.join(dict.fromkeys(rest))} cannot be mended without training or its author",
        )
    if not mended:
        return (), "nothing was written: there is nothing to mend"
    metadata = codec.metadata | {"made_by": mark("doctor"), "mended": list(mended)}
    save_codec(codec, path, **metadata)
    return mended, f"{path}: mended {', '.join(mended)}"
