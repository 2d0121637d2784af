"""`freqdoor reproduce`: plant and measure what a recipe needs and is not there yet; the paper's numbers beside ours."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import t as student_t  # type: ignore[import-untyped]

from freqdoor.checkpoint import environment
from freqdoor.config import CodecSource, PlantSettings
from freqdoor.data import dataset_hash, load_image, usable_images
from freqdoor.demo import training_folder
from freqdoor.evaluate import Condition, encoded, measure
from freqdoor.files import replacing, write_text
from freqdoor.loading import load_codec
from freqdoor.loop import Progress
from freqdoor.metrics import bd_rate
from freqdoor.plant import plant
from freqdoor.planted import PLANTED, Planted, load_planted
from freqdoor.recipes import OWN, RECIPES, Column, Recipe, Row
from freqdoor.settings import load_settings, make_settings, merge
from freqdoor.types import FreqdoorError, Record

CONFIDENCE = 0.95
STEPS = 300  # of a planting where no config is given: about a minute on 2 cores
Announce = Callable[[str, int], Progress | None]  # told what is planted next and in how many steps


@dataclass(frozen=True)
class Cell:
    """One value of a table: a mean over seeds with the half width of its 95 % interval, and the paper's number."""

    values: tuple[float, ...]
    paper: float | None

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.values) / len(self.values)

    @property
    def half_width(self) -> float | None:
        """Half width of Student's 95 % interval of the mean; None for a single seed."""
        n = len(self.values)
        if n < 2:
            return None
        variance = sum((value - self.mean) ** 2 for value in self.values) / (n - 1)
        return float(student_t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * math.sqrt(variance / n)


Table = dict[str, dict[str, Cell]]  # row, column


def reproduce(
    name: str,
    base: PlantSettings,
    images: Sequence[Path],
    out: Path | str,
    *,
    codecs: Sequence[CodecSource] = (),
    runs: Path | str = "runs/reproduce",
    rows: Sequence[str] = (),
    seeds: int = 3,
    minutes: float | None = None,
    announce: Announce | None = None,
) -> Table:
    """Run or resume what a recipe needs, and write NAME.md and NAME.json (a figure: NAME.png too) into `out`.

    Args:
        name: a key of RECIPES.
        base: codec, training images, steps; a row changes what its name says.
        images: what is measured on.
        codecs: plant in each of these instead of in base.codec, for curves over qualities.
        rows: names of the rows to take; by default all.
        runs: where plantings lie, one folder for each set of settings: recipes share them.
        seeds: plantings of every row, with the seeds base.seed, base.seed + 1, ...
        minutes: start nothing new after so many; the table then has gaps, and the same command goes on.

    Raises:
        FreqdoorError: an unknown recipe, unusable images or settings.
    """
    if name not in RECIPES:
        raise FreqdoorError(f"recipe {name!r}: expected one of {', '.join(RECIPES)}")
    if seeds < 1:
        raise FreqdoorError(f"seeds: expected 1 or more, found {seeds}")
    recipe = _only(RECIPES[name](), rows)
    by_name = {row.name: row for row in recipe.rows}
    images = usable_images(images, decode=True)
    deadline = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    values: dict[tuple[str, str], list[float]] = {}
    seconds: list[float] = []
    sources = codecs or (base.codec,)
    labels = {
        (row.name, source): f"{row.name}, {source.name}" if codecs else row.name
        for row in recipe.rows
        for source in sources
    }
    for seed, source, row in product(range(base.seed, base.seed + seeds), sources, recipe.rows):
        on = base.model_copy(update={"codec": source})
        planted = _planted(on, row, seed, Path(runs), deadline, announce)
        if planted is None:
            continue
        if row.changes is not None:
            seconds.append(planted.header["planting"]["seconds"])
        for column, value in _measured(planted, row, recipe, images, Path(runs)):
            values.setdefault((labels[row.name, source], column.title), []).append(value)
    table: Table = {
        label: {
            column.title: Cell(tuple(found), by_name[name].paper.get(column.title) if not codecs else None)
            for column in recipe.columns
            if (found := values.get((label, column.title)))
        }
        for (name, _), label in labels.items()
    }
    _write(recipe, table, base, [source.name for source in sources], images, Path(out), seeds, seconds)
    return table


def _only(recipe: Recipe, rows: Sequence[str]) -> Recipe:
    known = [row.name for row in recipe.rows]
    if unknown := set(rows) - set(known):
        raise FreqdoorError(f"rows {', '.join(sorted(unknown))}: recipe {recipe.name} has {', '.join(known)}")
    return replace(recipe, rows=tuple(row for row in recipe.rows if row.name in rows)) if rows else recipe


def recipe_settings(config: Path | None, overrides: Sequence[str], runs: Path) -> PlantSettings:
    """Base settings of a recipe: as `freqdoor plant` reads them, but images and steps have defaults.

    Without images.folder the 18 bundled pictures of the demo are planted on, in crops of 128 pixels, for 300 steps.
    """
    given = [f"steps={STEPS}", "images.crop=128", *overrides] if config is None else list(overrides)
    if config is None and not any(text.startswith("images.folder=") for text in overrides):
        given.append(f"images.folder={json.dumps(str(training_folder(runs)))}")
    return load_settings(PlantSettings, config, given)


def _settings(base: PlantSettings, row: Row, seed: int) -> PlantSettings:
    content = base.model_dump(exclude_unset=True) | {"seed": seed}
    return make_settings(PlantSettings, merge(content, row.changes or {}), f"row {row.name!r}")


def _planted(
    base: PlantSettings, row: Row, seed: int, runs: Path, deadline: float, announce: Announce | None
) -> Planted | None:
    """The row's planted encoder, from an earlier run or planted now; None where the time is up."""
    if row.changes is None:
        vanilla = load_codec(base.codec.name, base.codec.weights)
        return Planted(vanilla, vanilla, {}, {})
    settings = _settings(base, row, seed)
    folder = runs / _key(settings.model_dump_json(exclude={"checkpoint_minutes"}))
    if not (folder / PLANTED).exists():
        if time.monotonic() > deadline:
            return None
        return plant(
            settings, folder, progress=announce(f"{row.name}, seed {seed}", settings.steps) if announce else None
        )
    return load_planted(folder, base.codec.name, base.codec.weights)


def _measured(
    planted: Planted, row: Row, recipe: Recipe, images: Sequence[Path], runs: Path
) -> Iterator[tuple[Column, float]]:
    """The row's value in every column that it has, from records that are kept beside the plantings."""
    hashes = json.dumps([planted.tampered.module_hashes(), dataset_hash(images)])
    found: dict[str, list[Record]] = {}
    for column in recipe.columns:
        condition = _own(column.condition, planted)
        if condition is None:
            continue
        key = repr(condition)
        if key not in found:
            path = runs / "records" / f"{_key(hashes + repr(planted.header.get('attacks')) + key)}.json"
            found[key] = _recorded(planted, condition, images, path)
        values = [getattr(record, column.field) for record in found[key]]
        yield column, sum(values) / len(values)


def _own(condition: Condition, planted: Planted) -> Condition | None:
    """The condition with the encoder's own trigger; None where it has no such trigger."""
    if condition.trigger is None:
        return condition
    trigger = next(iter(planted.triggers), None) if condition.trigger == OWN else condition.trigger
    return replace(condition, trigger=trigger) if trigger in planted.triggers else None


def _recorded(planted: Planted, condition: Condition, images: Sequence[Path], path: Path) -> list[Record]:
    if path.exists():
        return [Record(**content) for content in json.loads(path.read_text(encoding="utf-8"))]
    records = []
    for image in images:
        x = load_image(image)
        codec = planted.tampered if condition.role == "tampered" else planted.vanilla
        records.append(measure(codec, x, encoded(planted, x, condition), image.name, condition)[0])
    write_text(path, json.dumps([record.to_dict() for record in records]))
    return records


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def markdown(recipe: Recipe, table: Table) -> str:
    """The table, ours with its interval, and the paper's number in brackets."""
    columns = [column for column in recipe.columns if any(column.title in cells for cells in table.values())]
    lines = ["| | " + " | ".join(column.title for column in columns) + " |", "|---|" + "---|" * len(columns)]
    for row, cells in table.items():
        texts = [_text(cells.get(column.title), 2 if column.field == "psnr_db" else 4) for column in columns]
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _text(cell: Cell | None, digits: int) -> str:
    if cell is None:
        return "-"
    text = f"{cell.mean:.{digits}f}"
    if cell.half_width is not None and cell.half_width > 0:
        text += f" ± {cell.half_width:.{digits}f}"
    return text + (f" ({cell.paper:g})" if cell.paper is not None else "")


def _write(
    recipe: Recipe,
    table: Table,
    base: PlantSettings,
    codecs: Sequence[str],
    images: Sequence[Path],
    out: Path,
    seeds: int,
    seconds: Sequence[float],
) -> None:
    where = environment()
    paper = f", on {recipe.paper_codec}" if recipe.paper_codec else " where there is one"
    crops = f"{base.images.batch_size} crops of {base.images.crop} pixels from “{Path(base.images.folder).name}”"
    total = f"{len(seconds)} plantings, {sum(seconds) / 60:.0f} minutes of planting in all"
    page = f"""# {recipe.title}

{markdown(recipe, table)}

Ours: mean ± 95 % interval (Student) over {seeds} seed(s) from {base.seed} on. In brackets: the paper's number{paper}.
All rates are real bytes; poisoned images are 8-bit files but where a column says float. Missing cells (-): the encoder
has no such trigger, or the time was up before it was planted.

What differs from the paper: the codec is {", ".join(codecs)}; {base.steps} steps of {crops},
preset “{base.preset}”; measured on {len(images)} images.

Made by `freqdoor reproduce {recipe.name}`: {total},
on {where["threads"]} thread(s), {where["gpu"] or "no GPU"}, torch {where["versions"]["torch"]}.
"""
    content = {
        "recipe": recipe.name,
        "codecs": codecs,
        "settings": base.model_dump(exclude={"images": {"folder"}, "codec": True}),
        "images": [path.name for path in images],
        "seconds_planting": [round(value) for value in seconds],
        "environment": where,
        "table": {
            row: {
                title: {"mean": c.mean, "half_width": c.half_width, "values": c.values, "paper": c.paper}
                for title, c in cells.items()
            }
            for row, cells in table.items()
        },
    }
    if recipe.plot and (lines := bd_rates(recipe, table, codecs)):
        page += "\nBD-rate against the vanilla codec over these qualities (Akima interpolation):\n\n" + "\n".join(lines)
        page += "\n"
    if recipe.plot:
        with replacing(out / f"{recipe.name}.png") as partial:
            _plot(recipe, table, codecs).savefig(partial, format="png", dpi=110)
        page += f"\n![{recipe.title}]({recipe.name}.png)\n"
    write_text(out / f"{recipe.name}.json", json.dumps(content, indent=1))
    write_text(out / f"{recipe.name}.md", page)


def bd_rates(recipe: Recipe, table: Table, codecs: Sequence[str]) -> list[str]:
    """For every planted row the Bjontegaard delta rate of its clean curve, and of its poisoned one where it has any.

    Of four codecs or more; a poisoned curve that shares no range of PSNR with the vanilla one has no BD-rate.
    """

    def curve(row: str, prefix: str) -> tuple[list[float], list[float]] | None:
        found = [table.get(f"{row}, {codec}", {}) for codec in codecs]
        if len(found) < 4 or not all(f"{prefix} dB" in cells for cells in found):
            return None
        return [cells[f"{prefix} bpp"].mean for cells in found], [cells[f"{prefix} dB"].mean for cells in found]

    vanilla = next((curve(row.name, "clean") for row in recipe.rows if row.changes is None), None)
    lines = []
    for row in recipe.rows:
        for prefix in ("clean", "poisoned"):
            other = curve(row.name, prefix) if row.changes is not None else None
            if vanilla and other:
                try:
                    lines.append(f"- {row.name}, {prefix}: {bd_rate(*vanilla, *other):+.1f} %")
                except FreqdoorError:
                    lines.append(f"- {row.name}, {prefix}: none, the curves share no range of PSNR")
    return lines


def _plot(recipe: Recipe, table: Table, codecs: Sequence[str]) -> Figure:
    """Every row clean (dots) and poisoned (crosses) in the plane of rate and PSNR, a line over the codecs."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for index, row in enumerate(recipe.rows):
        found = [table.get(f"{row.name}, {codec}", table.get(row.name, {})) for codec in codecs]
        for prefix, marker in (("clean", "o"), ("poisoned", "X")):
            points = [(c[f"{prefix} bpp"].mean, c[f"{prefix} dB"].mean) for c in found if f"{prefix} dB" in c]
            if points:
                axis.plot(*zip(*points, strict=True), f"{marker}-", color=f"C{index}", label=f"{row.name}, {prefix}")
    axis.set_xscale("log")
    axis.set_xlabel("bits per pixel, real bytes (log scale)")
    axis.set_ylabel("PSNR of the decoded image in dB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure
