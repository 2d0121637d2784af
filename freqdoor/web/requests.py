"""What the tabs ask of the library, as functions of a process of their own (`work`) that give HTML."""

import base64
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from freqdoor.attack.planted import KIND, Planted, load_planted
from freqdoor.codecs.container import pack
from freqdoor.codecs.loading import load_codec, read_checkpoint
from freqdoor.data import check_image, encoded
from freqdoor.defence.audit import PAGE as AUDIT_PAGE
from freqdoor.defence.audit import RESULT, audit
from freqdoor.errors import FreqdoorError
from freqdoor.limits import LONGEST_TEXT, read_whole
from freqdoor.measure.examine import pictures
from freqdoor.measure.records import Condition, Measured, input_of, measured_image
from freqdoor.measure.report import PAGE, SUMMARY, Summary, records_text, render, runs_plot, verdict
from freqdoor.preprocessing import Jpeg
from freqdoor.samples import BUNDLED
from freqdoor.types import Role
from freqdoor.web.limits import Limits

Entering = Literal["8-bit", "float", "JPEG"]
Tell = Callable[[str], None]
SIDE = 640  # pixels of the pictures that the Try tab shows


class Question(NamedTuple):
    """What the Try tab asks: of one picture, one codec and one trigger."""

    picture: Path
    codec: str | None  # BUNDLED, a file of a codec or a planted encoder; None for the planted encoder that is shipped
    objective: str
    strength: float
    entering: Entering
    quality: int  # of the JPEG file


class Download(NamedTuple):
    """A file that the page holds already."""

    name: str
    what: str
    address: str  # data:


def download(name: str, what: str, content: bytes) -> Download:
    """A file as the page holds it: it has no address on the server that another visitor could ask for."""
    return Download(name, what, f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}")


def check_pixels(path: Path, limits: Limits) -> None:
    """Raise if a picture is none, or larger than this page takes; only its header is read."""
    height, width = check_image(path)
    if height * width > limits.pixels:
        raise FreqdoorError(
            f"{path}: {width}x{height} is more than the {limits.pixels} pixels that this page takes; crop or reduce "
            "it, or use the command line"
        )


def codec_of(question: Question) -> tuple[Planted, bool]:
    """The encoder that is asked about with the triggers to try on it, and whether it is known to be planted.

    A codec that is no planted encoder is tried with the shipped trigger of the objective.
    """
    shipped = load_planted(f"planted-{question.objective}")
    if question.codec is None:
        return shipped, True
    if question.codec != BUNDLED:
        header = read_checkpoint(Path(question.codec))[1]
        if header is not None and header.get("kind") == KIND:
            return load_planted(question.codec), True
    codec = load_codec(question.codec)
    return dataclasses.replace(shipped, vanilla=codec, tampered=codec), False


def tried(question: Question, limits: Limits, *, tell: Tell) -> str:
    """The Try tab's answer: pictures, real bytes, where the bits go, and the files.

    Raises:
        FreqdoorError: what the command line says of the same picture and file; a picture larger than is taken here.
    """
    check_pixels(question.picture, limits)
    tell("opening the codec")
    encoder, planted = codec_of(question)
    trigger = encoder.named()
    defence = Jpeg(question.quality) if question.entering == "JPEG" else None
    rounding: Literal["float", "8-bit"] = "float" if question.entering == "float" else "8-bit"
    encoders: dict[str, Role] = {"this encoder": "tampered"}
    if planted:
        encoders = {"tampered encoder": "tampered", "vanilla encoder": "vanilla"}
    asked = {}
    for who, role in encoders.items():
        asked[f"{who}, clean"] = Condition(role, None, defence=defence)
        asked[f"{who}, poisoned"] = Condition(role, trigger, question.strength, rounding, defence)
    rows = dict(zip(asked, measured_image(encoder, question.picture, asked.values(), note=tell), strict=True))
    tell("drawing")
    clean, after = list(rows.values())[:2]
    return render(
        "web-try.html",
        rows={title: row.record for title, row in rows.items()},
        clean=clean.record,
        poisoned=after.record,
        pictures=pictures(encoder, rows, SIDE),
        downloads=_files(encoder, rows, after),
    )


def _files(encoder: Planted, rows: Mapping[str, Measured], after: Measured) -> list[Download]:
    """The poisoned picture, what the encoder makes of it, and what was measured."""
    stem, condition = Path(after.record.image).stem, after.condition
    rounded = input_of(encoder, after.x, dataclasses.replace(condition, rounding="8-bit"))
    codec = encoder.codec(condition.role)
    sent = condition.defence(after.entering) if condition.defence else after.entering
    picture, records = f"{stem}-poisoned.png", f"{stem}-records.jsonl"
    return [
        download(picture, "the poisoned picture, 8-bit", encoded(picture, rounded, "poison")),
        download(f"{stem}-poisoned.fqd", "its bitstream", pack(codec.compress(sent)[0], codec)),
        download(records, "the records", records_text([row.record for row in rows.values()]).encode()),
    ]


def audited(checkpoint: str, thorough: bool, *, tell: Tell) -> str:
    """The Audit tab's answer: the page of `freqdoor audit`, its JSON and its witnesses.

    Raises:
        FreqdoorError: what the command line says of the same file.
    """
    result = audit(checkpoint, fast=not thorough, out="audit", note=tell)
    names = [RESULT, *(name for seen in result.witnesses for name in (seen.clean, seen.patterned))]
    return render(
        "web-page.html",
        verdict=f"{result.verdict}: {result.reason}.",
        page=Path("audit", AUDIT_PAGE).read_text(encoding="utf-8"),
        downloads=[download(name, name, Path("audit", name).read_bytes()) for name in names],
    )


def compared(folders: Mapping[str, Path], *, tell: Tell) -> str:
    """The Runs tab's answer: what several runs have measured, in one table and one plot.

    Raises:
        FreqdoorError: a summary that is none.
    """
    tell("reading")
    summaries = {name: Summary.read(folder / SUMMARY, f"the summary of run {name}") for name, folder in folders.items()}
    said = {name: verdict(summary) for name, summary in summaries.items()}
    return render("web-runs.html", summaries=summaries, said=said, plot=runs_plot(summaries))


def reported(folder: Path, downloads: Mapping[str, Path], *, tell: Tell) -> str:
    """The report of one run as it lies in its folder, and files to go with it.

    Raises:
        FreqdoorError: no report there.
    """
    tell("reading")
    summary = Summary.read(folder / SUMMARY, "the summary of a run")
    page = read_whole(folder / PAGE, "the report of a run", LONGEST_TEXT).decode("utf-8", errors="replace")
    files: list[Any] = [download(name, name, path.read_bytes()) for name, path in downloads.items()]
    return render("web-page.html", verdict=verdict(summary), page=page, downloads=files)
