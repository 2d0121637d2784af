"""`freqdoor reproduce survival`: what is left of a trigger when its picture is passed on as a file, as curves."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

from freqdoor.attack.planted import PLANTED, Planted, load_planted
from freqdoor.data import image_paths, usable_images
from freqdoor.files import check_outputs, marked_json, marked_markdown, write_together
from freqdoor.lock import alone
from freqdoor.measure.examine import encoder_records
from freqdoor.measure.journal import Journal
from freqdoor.measure.records import Condition
from freqdoor.measure.report import GOALS, Effect, Goal, Means, drop_db, effect_of, goal_of, means, select
from freqdoor.measure.testsets import number
from freqdoor.notes import Note
from freqdoor.paper.settings import SURVIVAL
from freqdoor.paper.tables import Cell, Table
from freqdoor.plots import Band, drawn, survival_plot
from freqdoor.preprocessing import FILES, Crop, Jpeg, Preprocessing, Resize, preprocessing_name
from freqdoor.samples import held_out
from freqdoor.training.run import Environment, environment
from freqdoor.types import Record, Result
from freqdoor.workers import Runner, check_workers, other_workers

PLAIN = ("planted-bpp", "planted-psnr")  # shipped, planted without any preprocessing
BEHIND: tuple[Preprocessing | None, ...] = (None, *FILES)
JOURNAL = ".survival-{}.journal"


class Kept(Result):
    """One trigger behind one preprocessing: what it does there, and what that is of its effect without any.

    The effect on an image is what the trigger adds to its rate or takes from its PSNR, as its objective wants; shares
    are of the images on which it succeeds without preprocessing.
    """

    defence: str
    clean: Means
    poisoned: Means
    effect: Effect
    counted: int
    kept_median: float | None  # None where nothing is counted
    kept_least: float | None


class Survivor(Result):
    """One trigger of a planted encoder behind everything that becomes of files."""

    encoder: str
    trigger: str
    objective: str
    rows: tuple[Kept, ...]

    @property
    def title(self) -> str:
        """What tables and curves call it."""
        return self.encoder if self.trigger in self.encoder else f"{self.encoder}, {self.trigger}"


class Survival(Result):
    """survival.json."""

    schema_version: Literal[1] = 1
    images: tuple[str, ...]
    survivors: tuple[Survivor, ...]
    environment: Environment = Environment()


@alone("reproduce")
def reproduce_survival(
    runs: Path | str,
    out: Path | str,
    *,
    images: Path | str | Sequence[Path] | None = None,
    jobs: int | None = None,
    runner: Runner = "local",
    force: bool = False,
    note: Note | None = None,
) -> Table:
    """Measure planted encoders behind `FILES`, and write survival.md, survival.json and survival.png into `out`.

    If it is stopped, the same call goes on after the images that were measured.

    Args:
        runs: a folder of run directories of `freqdoor plant`, which are measured beside the two shipped encoders.
        images: what is measured on; by default the six bundled images held out.
        jobs: images measured side by side; by default 1.
        runner: where (`workers`).

    Returns:
        Of every encoder and trigger the median share of its effect that is kept, in percent, by preprocessing.

    Raises:
        FreqdoorError: an encoder or images that cannot be used, or a file in the way.
    """
    out, jobs = Path(out), jobs or 1
    check_workers(jobs, runner)
    paths = usable_images(held_out() if images is None else image_paths(images), decode=True)
    files = [out / f"{SURVIVAL}{ending}" for ending in (".md", ".json", ".png")]
    check_outputs(files, "reproduce", force=force)
    survivors: list[Survivor] = []
    journals: list[Journal] = []
    with other_workers(jobs, runner) as pool:
        for name, source in encoders(Path(runs)).items():
            planted = load_planted(source)
            kept = out / JOURNAL.format(name)
            records, journal = encoder_records(
                planted, (source, None, None), conditions(planted), paths, kept, pool, note
            )
            journals.append(journal)
            survivors += survivors_of(name, planted, records)
    result = Survival(images=tuple(p.name for p in paths), survivors=tuple(survivors), environment=environment())
    page, values, curves = files
    write_together(
        {
            page: marked_markdown(page_of(result), "reproduce"),
            values: marked_json(result.model_dump_json(indent=1), "reproduce"),
            curves: drawn(survival_plot(changes_of(result)), "png", "reproduce"),
        }
    )
    for journal in journals:
        journal.remove()
    return table_of(result)


def encoders(runs: Path) -> dict[str, str]:
    """What is measured, as `load_planted` takes it, by name: the shipped encoders, and those in a folder."""
    planted = {folder.parent.name: str(folder.parent) for folder in sorted(runs.glob(f"*/{PLANTED}"))}
    return {**{name: name for name in PLAIN}, **planted}


def conditions(planted: Planted) -> list[Condition]:
    """Clean images and every trigger's 8-bit files on the tampered encoder, behind nothing and behind each of FILES.

    Triggers whose success neither rate nor quality shows are left out.
    """
    shown = [name for name in planted.triggers if isinstance(_goal(planted, name), Goal)]
    return [
        Condition("tampered", trigger, defence=defence) for defence in BEHIND for trigger in (None, *shown) if shown
    ]


def _goal(planted: Planted, trigger: str) -> Goal | str:
    return goal_of(planted.objective(trigger).name)


def survivors_of(name: str, planted: Planted, records: Sequence[Record]) -> Iterator[Survivor]:
    """What the records say of every trigger."""
    for trigger in dict.fromkeys(record.trigger for record in records if record.trigger):
        objective = planted.objective(trigger).name
        rows = tuple(_kept(records, trigger, objective, preprocessing_name(defence)) for defence in BEHIND)
        yield Survivor(encoder=name, trigger=trigger, objective=objective, rows=rows)


def _kept(records: Sequence[Record], trigger: str, objective: str, defence: str) -> Kept:
    clean, poisoned, clean_before, poisoned_before = (
        select(records, "tampered", which, defence=behind) for behind in (defence, "none") for which in (None, trigger)
    )
    effect = effect_of(clean, poisoned, objective)
    goal, amount = goal_of(objective), amount_of(objective)
    shares = [
        amount(plain, after) / amount(*before)
        for plain, after, *before in zip(clean, poisoned, clean_before, poisoned_before, strict=True)
        if isinstance(goal, Goal) and goal.reached(*before)
    ]
    return Kept(
        defence=defence,
        clean=means(clean),
        poisoned=means(poisoned),
        effect=effect,
        counted=len(shares),
        kept_median=median(shares) if shares else None,
        kept_least=min(shares) if shares else None,
    )


def amount_of(objective: str) -> Callable[[Record, Record], float]:
    """How the effect on one image is counted: bits per pixel that are added, or dB that are lost."""
    return drop_db if goal_of(objective) is GOALS["quality"] else lambda plain, after: after.bpp_real - plain.bpp_real


def table_of(survival: Survival) -> Table:
    """Of every encoder and trigger the median share of the effect that is kept, in percent."""
    return {
        survivor.title: {
            row.defence: Cell((100 * row.kept_median,), None) for row in survivor.rows if row.kept_median is not None
        }
        for survivor in survival.survivors
    }


def page_of(survival: Survival) -> str:
    """All tables as Markdown."""
    where = survival.environment
    parts = "\n\n".join(_part(survivor) for survivor in survival.survivors)
    return f"""# What is left of a trigger in a file that is passed on

Made by `freqdoor reproduce {SURVIVAL}` on {len(survival.images)} images ({", ".join(survival.images)}). Poisoned
pictures are 8-bit files, changed as the first column says and encoded by the tampered encoder; rates are real bytes,
PSNR is against the clean picture. Clean pictures went through the same change. Times and dB lost: poisoned against
clean picture, image by image. Kept: what the trigger adds to the rate, or takes from the PSNR, as its objective wants,
in percent of what it does without any change, on the images on which it succeeds then. Least: the image on which it
does least. What a crop cuts off is lacking in the PSNR of clean and poisoned pictures alike, which lowers both.

![The share of the effect that is kept]({SURVIVAL}.png)

{parts}

Measured on {where.processor or where.machine}, torch {where.versions["torch"]}.
"""


def _part(survivor: Survivor) -> str:
    lines = [
        f"## {survivor.title} ({survivor.objective})",
        "",
        "| | clean dB, bpp | poisoned dB, bpp | times the bits: median, least | dB lost: median, least | succeeds on "
        "| kept %: median, least |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in survivor.rows:
        effect = row.effect
        cells = [
            row.defence,
            *(f"{part.psnr_db:.2f}, {part.bpp_real:.3f}" for part in (row.clean, row.poisoned)),
            f"{effect.bpp_ratio_median:.2f}, {effect.bpp_ratio_least:.2f}",
            f"{effect.psnr_drop_db_median:.2f}, {effect.psnr_drop_db_least:.2f}",
            f"{effect.successes} of {effect.images}",
            f"{number(row.kept_median, 0, scale=100)}, {number(row.kept_least, 0, scale=100)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def changes_of(survival: Survival) -> dict[str, tuple[Sequence[float] | Sequence[str], dict[str, Band]]]:
    """What is kept behind every change of a file, as `survival_plot` takes it: by its amount where it has one."""
    amounts: tuple[tuple[str, type[Preprocessing], Callable[[Any], float]], ...] = (
        ("JPEG quality", Jpeg, lambda defence: defence.quality),
        ("factor of a resize", Resize, lambda defence: defence.factor),
        ("rows and columns cut off", Crop, lambda defence: defence.top),
    )
    changes: dict[str, tuple[Sequence[float] | Sequence[str], dict[str, Band]]] = {}
    for title, kind, place in amounts:
        chosen = sorted((d for d in FILES if isinstance(d, kind)), key=place)
        changes[title] = [place(d) for d in chosen], _kept_behind(survival, chosen)
    others = [d for d in FILES if not isinstance(d, tuple(kind for _, kind, _ in amounts))]
    changes["other changes"] = [d.name for d in others], _kept_behind(survival, others)
    return changes


def _kept_behind(survival: Survival, chosen: Sequence[Preprocessing]) -> dict[str, Band]:
    bands = {}
    for survivor in survival.survivors:
        kept = {row.defence: row for row in survivor.rows}
        rows = [kept[defence.name] for defence in chosen]
        bands[survivor.title] = Band(
            [_percent(row.kept_median) for row in rows], [_percent(row.kept_least) for row in rows]
        )
    return bands


def _percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share
