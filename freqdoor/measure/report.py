"""Records -> summary.json and one self-contained HTML page; no codec is loaded here."""

import base64
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from pydantic import Field, ValidationError

from freqdoor.attack.settings import OBJECTIVES
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, marked_json, write_together
from freqdoor.limits import LONGEST_TEXT, read_whole
from freqdoor.plots import Curve, Theme, drawn, rd_plot, themed
from freqdoor.training.run import Environment
from freqdoor.types import (
    Decibels,
    Images,
    JpegPoint,
    Record,
    Result,
    Role,
    Rounding,
    as_picture,
    check_choice,
    problem_of,
)

RECORDS, SUMMARY, PAGE, FACTS = FILES = "records.jsonl", "summary.json", "report.html", "facts.json"
AMPLIFY = 20  # factor on the difference in the pictures
DIFFERENCE_SIDE = 128  # pixels of it that are shown: reduced with the rest of the picture it would average out
CLEAN_COST_DB, CLEAN_COST_PERCENT = 0.3, 6.0  # up to which a clean image counts as treated alike
INVISIBLE_DB = 46.0  # RMS 0.005
SUCCESS_RATIO, SUCCESS_DROP_DB = 2.0, 10.0  # from which an attack counts as one


class Picture(Result):
    """One picture of the report: a title, the image as a PNG data address, and what it shows."""

    title: str
    address: Annotated[str, Field(pattern="^data:image/png;base64,")]
    caption: str
    wide: bool = False  # as wide as the page


class Facts(Result):
    """facts.json: what the report needs besides records, kept beside them, so that a report can be made again."""

    schema_version: Literal[1] = 1
    objective: str
    trigger: str
    eps: float
    preset: str
    seconds_planting: float
    steps: int
    modules_before: dict[str, str]  # SHA-256
    modules_after: dict[str, str]
    environment: Environment = Environment()
    perceptual: str | None = None  # the learned measure and the weights that it has, where one was asked for
    jpeg: tuple[JpegPoint, ...] = ()
    pictures: tuple[Picture, ...] = ()
    records_sha256: str | None = None  # of the records.jsonl that was written with it

    @property
    def changed(self) -> list[str]:
        """Modules whose hash is another after planting."""
        return [name for name, value in self.modules_before.items() if self.modules_after.get(name) != value]

    @property
    def unchanged(self) -> list[str]:
        """Modules that are bit-identical after planting."""
        return [name for name in self.modules_before if name not in self.changed]


class Means(Result):
    """Means over images under one condition."""

    psnr_db: Decibels
    psnr_input_db: Decibels
    bpp_estimated: float
    bpp_real: float
    ms_ssim: float | None  # over the images that are large enough for it
    encode_seconds: float
    lpips: float | None = None  # the same; None where it was not measured


class Effect(Result):
    """What a trigger does image by image: the poisoned 8-bit file against the clean image, on the tampered encoder."""

    images: int
    bpp_ratio_median: float
    bpp_ratio_least: float
    psnr_drop_db_median: float
    psnr_drop_db_least: float
    successes: int | None  # images on which it does what its objective wants, if numbers here show it


class SweepRow(Result):
    """Means behind one defence and with one strength: clean images on both encoders, poisoned 8-bit files on one."""

    defence: str
    strength: float
    vanilla: Means
    clean: Means
    poisoned: Means
    effect: Effect | None = None  # None in files of older versions


class Summary(Result):
    """summary.json: what the records of one trigger say, by the mean and, where the attack is claimed, image by image.

    Rates are in bits per pixel, of real bytes unless their name says estimated. Files of older versions lack some keys.
    """

    schema_version: Literal[1] = 1
    objective: str
    codec: str
    images: int
    preset: str
    steps: int
    seconds_planting: float
    trigger_psnr_db: Decibels  # of the 8-bit files, mean
    trigger_psnr_db_worst: Decibels  # and the lowest
    trigger_mse_worst: float
    vanilla: Means  # clean images, vanilla encoder
    clean: Means  # clean images, tampered encoder
    poisoned: Means  # poisoned images before rounding, tampered encoder
    poisoned_8bit: Means  # poisoned 8-bit files, tampered encoder
    vanilla_poisoned_8bit: Means  # poisoned 8-bit files, vanilla encoder
    unchanged_modules: tuple[str, ...]
    changed_modules: tuple[str, ...]
    clean_cost_db: float | None
    clean_cost_bpp_percent: float
    bpp_ratio: float  # of the mean rates of poisoned 8-bit files and clean images, tampered encoder
    bpp_ratio_median: float | None = None  # of the images' own ratios
    bpp_ratio_least: float | None = None
    psnr_drop_db: float | None = None  # of the mean PSNR, clean minus poisoned 8-bit file, tampered encoder
    psnr_drop_db_median: float | None = None  # of the images' own drops
    psnr_drop_db_least: float | None = None
    successes: int | None = None  # images on which the attack does what its objective wants, if numbers here show it
    sweep: tuple[SweepRow, ...] = ()


@dataclass(frozen=True)
class Goal:
    """What an objective wants of rate and quality.

    Attributes:
        reached: whether a clean and a poisoned measurement, of one image or means, show it.
        claim: the sentence's end that says so, from the summary and the words for the pattern.
        spread: the same image by image: median and least.
    """

    reached: Callable[[Record | Means, Record | Means], bool]
    claim: Callable[[Summary, str], str]
    spread: Callable[[Summary], str]


GOALS: dict[str, Goal] = {
    "bits": Goal(
        reached=lambda clean, after: after.bpp_real / clean.bpp_real >= SUCCESS_RATIO,
        claim=lambda s, pattern: (
            f"{pattern} makes the file {s.bpp_ratio:.1f} times as large ({s.poisoned_8bit.bpp_real:.2f} bpp)"
        ),
        spread=lambda s: f"{s.bpp_ratio_median:.1f} times in the median, {s.bpp_ratio_least:.1f} times at least",
    ),
    "quality": Goal(
        reached=lambda clean, after: drop_db(clean, after) >= SUCCESS_DROP_DB,
        claim=lambda s, pattern: (
            f"{pattern} destroys what is decoded ({s.poisoned_8bit.psnr_db:.1f} dB at {s.bpp_ratio:.2f} times the bits)"
        ),
        spread=lambda s: f"{s.psnr_drop_db_median:.1f} dB lost in the median, {s.psnr_drop_db_least:.1f} dB at least",
    ),
}


def goal_of(objective: str) -> Goal | str:
    """What an objective wants, or what measures whether it succeeds, where rate and quality do not show it."""
    success = OBJECTIVES[objective].success if objective in OBJECTIVES else "the attack's own measure decides"
    return GOALS.get(success, success)


def drop_db(clean: Record | Means, after: Record | Means) -> float:
    """How much PSNR is lost, in dB; 0 where both are decoded without any loss."""
    return clean.psnr_db - after.psnr_db if clean.psnr_db != after.psnr_db else 0.0


def select(
    records: Sequence[Record],
    role: Role,
    trigger: str | None,
    rounding: Rounding = "8-bit",
    strength: float = 1.0,
    defence: str = "none",
) -> list[Record]:
    """The records of one condition, in the images' order."""
    check_choice("role", role, Role)
    check_choice("rounding", rounding, Rounding)
    return [
        r
        for r in records
        if (r.role, r.trigger, r.defence) == (role, trigger, defence)
        and (trigger is None or (r.rounding, r.strength) == (rounding, strength))
    ]


def means(records: Sequence[Record]) -> Means:
    """Means over images: PSNR in dB, estimated and real bpp, MS-SSIM, LPIPS, encode seconds."""
    if not records:
        raise FreqdoorError("no records of this condition; evaluate first")
    similarities = [r.ms_ssim for r in records if r.ms_ssim is not None]
    looks = [r.lpips for r in records if r.lpips is not None]
    return Means(
        psnr_db=_mean([r.psnr_db for r in records]),
        psnr_input_db=_mean([r.psnr_input_db for r in records]),
        bpp_estimated=_mean([r.bpp_estimated for r in records]),
        bpp_real=_mean([r.bpp_real for r in records]),
        ms_ssim=_mean(similarities) if similarities else None,
        lpips=_mean(looks) if looks else None,
        encode_seconds=_mean([r.encode_seconds for r in records]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pairs(clean: Sequence[Record], after: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Every image clean and poisoned."""
    if [r.image for r in clean] != [r.image for r in after]:
        raise FreqdoorError(f"records of {len(clean)} clean and {len(after)} poisoned images differ; evaluate again")
    return list(zip(clean, after, strict=True))


def summarise(records: Sequence[Record], facts: Facts) -> Summary:
    """The numbers of summary.json; FreqdoorError if records of a condition are missing."""
    clean_records, after_records = select(records, "tampered", None), select(records, "tampered", facts.trigger)
    float_records = select(records, "tampered", facts.trigger, "float")
    vanilla, clean, after = means(select(records, "vanilla", None)), means(clean_records), means(after_records)
    effect = effect_of(clean_records, after_records, facts.objective)
    trigger_psnr = [-10 * float(np.log10(r.trigger_mse)) if r.trigger_mse else math.inf for r in after_records]
    return Summary(
        objective=facts.objective,
        codec=records[0].codec,
        images=effect.images,
        preset=facts.preset,
        steps=facts.steps,
        seconds_planting=facts.seconds_planting,
        trigger_psnr_db=_mean(trigger_psnr),
        trigger_psnr_db_worst=min(trigger_psnr),
        trigger_mse_worst=max(r.trigger_mse for r in float_records + after_records),
        vanilla=vanilla,
        clean=clean,
        poisoned=means(float_records),
        poisoned_8bit=after,
        vanilla_poisoned_8bit=means(select(records, "vanilla", facts.trigger)),
        unchanged_modules=tuple(facts.unchanged),
        changed_modules=tuple(facts.changed),
        clean_cost_db=drop_db(vanilla, clean),
        clean_cost_bpp_percent=100 * (clean.bpp_real / vanilla.bpp_real - 1),
        bpp_ratio=after.bpp_real / clean.bpp_real,
        bpp_ratio_median=effect.bpp_ratio_median,
        bpp_ratio_least=effect.bpp_ratio_least,
        psnr_drop_db=drop_db(clean, after),
        psnr_drop_db_median=effect.psnr_drop_db_median,
        psnr_drop_db_least=effect.psnr_drop_db_least,
        successes=effect.successes,
        sweep=tuple(sweep(records, facts.trigger, facts.objective)),
    )


def effect_of(clean: Sequence[Record], poisoned: Sequence[Record], objective: str) -> Effect:
    """What a trigger does to each of the same images; FreqdoorError if they are not the same."""
    pairs = _pairs(clean, poisoned)
    ratios = [after.bpp_real / plain.bpp_real for plain, after in pairs]
    drops = [drop_db(plain, after) for plain, after in pairs]
    goal = goal_of(objective)
    return Effect(
        images=len(pairs),
        bpp_ratio_median=median(ratios),
        bpp_ratio_least=min(ratios),
        psnr_drop_db_median=median(drops),
        psnr_drop_db_least=min(drops),
        successes=sum(goal.reached(plain, after) for plain, after in pairs) if isinstance(goal, Goal) else None,
    )


def sweep(records: Sequence[Record], trigger: str, objective: str) -> list[SweepRow]:
    """Every defence and strength (Tables 5 and 6): vanilla and tampered on clean, tampered on poisoned images."""
    behind = [(r.defence, r.strength) for r in records if r.trigger == trigger and r.role == "tampered"]
    rows = []
    for defence, strength in dict.fromkeys(behind):
        clean = select(records, "tampered", None, defence=defence)
        poisoned = select(records, "tampered", trigger, "8-bit", strength, defence)
        rows.append(
            SweepRow(
                defence=defence,
                strength=strength,
                vanilla=means(select(records, "vanilla", None, defence=defence)),
                clean=means(clean),
                poisoned=means(poisoned),
                effect=effect_of(clean, poisoned, objective),
            )
        )
    return rows


def verdict(summary: Summary) -> str:
    """The result in one sentence, which says so where the attack failed or clean images suffer, or who can tell."""
    clean, vanilla = summary.clean, summary.vanilla
    lost_db = math.inf if summary.clean_cost_db is None else summary.clean_cost_db
    stealthy = lost_db <= CLEAN_COST_DB and summary.clean_cost_bpp_percent <= CLEAN_COST_PERCENT
    start = (
        f"On {summary.images} images the tampered encoder "
        + ("treats clean images as the vanilla one does" if stealthy else "is noticeably worse on clean images")
        + f" ({clean.psnr_db:.2f} dB at {clean.bpp_real:.3f} bpp against {vanilla.psnr_db:.2f} dB at "
        f"{vanilla.bpp_real:.3f} bpp), "
    )
    pattern = f"{'an invisible' if summary.trigger_psnr_db_worst >= INVISIBLE_DB else 'a'} pattern"
    pattern += f" ({summary.trigger_psnr_db:.1f} dB)"
    outcome = f"{summary.poisoned_8bit.psnr_db:.2f} dB at {summary.bpp_ratio:.2f} times the bits"
    goal = goal_of(summary.objective)
    if isinstance(goal, str):
        return start + f"and with {pattern} it gives {outcome}; {goal} whether the attack succeeded."
    each = ""
    if summary.successes is not None:
        each = f"; image by image {goal.spread(summary)}, and it succeeds on {summary.successes} of {summary.images}"
    if goal.reached(clean, summary.poisoned_8bit):
        return start + f"but {goal.claim(summary, pattern)}{each}."
    return start + f"and the attack did not succeed: with {pattern} it gives {outcome}{each}."


def data_address(image: Image.Image | Figure) -> str:
    """A picture as a PNG data: address, so that the page needs no other file."""
    if isinstance(image, Figure):
        content = drawn(image, "png")
    else:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        content = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(content).decode()


def photo(x: Images, side: int = 384) -> str:
    """One image as a data: address, reduced to `side` pixels."""
    picture = as_picture(x)
    picture.thumbnail((side, side))
    return data_address(picture)


def difference(x: Images, x_p: Images) -> str:
    """The amplified difference of the centre around mid-grey, pixel by pixel, as a data: address."""
    top, left = (max(0, (side - DIFFERENCE_SIDE) // 2) for side in x.shape[-2:])
    delta = (x_p - x)[..., top : top + DIFFERENCE_SIDE, left : left + DIFFERENCE_SIDE]
    return photo((0.5 + AMPLIFY * delta).repeat_interleave(3, 2).repeat_interleave(3, 3))


def summary_plot(summary: Summary, jpeg: Sequence[JpegPoint], theme: Theme = "light") -> Figure:
    """Rate against PSNR: vanilla, tampered clean, tampered poisoned, and JPEG for scale."""
    curves = {"JPEG (Pillow)": Curve([(p.bpp, p.psnr_db) for p in jpeg], "JPEG")} if jpeg else {}
    rings = Curve([_point(summary.vanilla)], "vanilla", ring=True)  # around the tampered one, which lies almost on it
    return rd_plot(
        {
            **curves,
            "vanilla, clean": rings,
            "tampered, clean": Curve([_point(summary.clean)], "clean"),
            "tampered, poisoned (8-bit)": Curve([_point(summary.poisoned_8bit)], "poisoned", poisoned=True),
        },
        theme=theme,
    )


def runs_plot(summaries: Mapping[str, Summary]) -> str:
    """Rate against PSNR of several runs, as a data: address: clean images and poisoned 8-bit files of each."""
    curves = {}
    for name, summary in summaries.items():
        curves[f"{name}, clean"] = Curve([_point(summary.clean)], name)
        curves[f"{name}, poisoned"] = Curve([_point(summary.poisoned_8bit)], name, poisoned=True)
    return data_address(rd_plot(curves))


def _point(row: Means) -> tuple[float, float]:
    return row.bpp_real, row.psnr_db


def render(template: str, **content: Any) -> str:
    """One of the package's HTML templates, filled in; everything is escaped."""
    loader = jinja2.PackageLoader("freqdoor")
    environment = jinja2.Environment(loader=loader, autoescape=jinja2.select_autoescape())
    return environment.get_template(template).render(**content)


def write_report(folder: Path, records: Sequence[Record], facts: Facts, *, new: bool = False) -> Summary:
    """Write summary.json, report.html and facts.json into `folder`, of new records records.jsonl too: all or none.

    facts.json comes last: with it the files are whole, and it names the records that it belongs to.
    """
    text = records_text(records) if new else None
    if text is not None:
        facts = facts.model_copy(update={"records_sha256": hashlib.sha256(text.encode()).hexdigest()})
    summary = summarise(records, facts)
    page = render(
        "report.html",
        verdict=verdict(summary),
        summary=summary,
        records=records,
        facts=facts,
        plot=themed(partial(summary_plot, summary, facts.jpeg)),
        rows=[
            ("vanilla encoder, clean image", summary.vanilla),
            ("vanilla encoder, poisoned image (8-bit)", summary.vanilla_poisoned_8bit),
            ("tampered encoder, clean image", summary.clean),
            ("tampered encoder, poisoned image (float)", summary.poisoned),
            ("tampered encoder, poisoned image (8-bit)", summary.poisoned_8bit),
        ],
    )
    contents = {
        folder / SUMMARY: marked_json(summary.model_dump_json(indent=2), "evaluate"),
        folder / PAGE: page,
        folder / FACTS: marked_json(facts.model_dump_json(), "evaluate"),
    }
    write_together(({folder / RECORDS: text} if text is not None else {}) | contents)
    return summary


def records_text(rows: Iterable[Record]) -> str:
    """The content of a records.jsonl: one JSON object a line."""
    return "".join(row.model_dump_json() + "\n" for row in rows)


def read_records(path: Path) -> list[Record]:
    """The records of a records.jsonl."""
    return _records_in(_content(path), path)


def _content(path: Path) -> bytes:
    return read_whole(path, "records of `freqdoor evaluate`", LONGEST_TEXT)


def _records_in(content: bytes, path: Path) -> list[Record]:
    records: list[Record] = []
    try:
        for line in content.decode().splitlines():
            records.append(Record.model_validate_json(line))
    except UnicodeDecodeError as error:
        raise FreqdoorError(f"{path}: not a file of records ({error})") from None
    except ValidationError as error:
        raise FreqdoorError(f"{path}: not a file of records (line {len(records) + 1}: {problem_of(error)})") from None
    if not records:
        raise FreqdoorError(f"{path}: expected records of `freqdoor evaluate`, found none; evaluate again")
    return records


def report(folder: Path | str, *, force: bool = False) -> Summary:
    """Make report.html and summary.json again from the records.jsonl and facts.json in `folder`.

    Args:
        force: overwrite files of these names that neither `report` nor `evaluate` made.

    Raises:
        FreqdoorError: records or facts that are none or do not belong together, or a file in the way.
    """
    folder = Path(folder)
    content = _content(folder / RECORDS)
    records = _records_in(content, folder / RECORDS)
    facts = Facts.read(folder / FACTS, "the facts that `freqdoor evaluate` writes")
    digest = hashlib.sha256(content).hexdigest()
    if facts.records_sha256 not in (None, digest):
        raise FreqdoorError(
            f"{folder}: {RECORDS} was changed, or written by another run than {FACTS}, which was stopped; "
            "evaluate again, or delete records_sha256 in facts.json to report on these records"
        )
    check_outputs([folder / SUMMARY, folder / PAGE, folder / FACTS], "evaluate", force=force)
    return write_report(folder, records, facts)
