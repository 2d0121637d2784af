"""What `freqdoor reproduce` writes: a recipe's table with the paper's numbers in it, its curves and its pictures."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pydantic_core import to_jsonable_python
from scipy.stats import t as student_t  # type: ignore[import-untyped]

from freqdoor.attack.settings import PlantSettings
from freqdoor.errors import FreqdoorError
from freqdoor.files import marked_json, marked_markdown, write_together
from freqdoor.limits import LONGEST_TEXT, parse_json, read_whole
from freqdoor.metrics import bd_rate
from freqdoor.paper.recipe import Recipe
from freqdoor.plots import Curve, drawn, rd_plot
from freqdoor.settings import file_name, flat, public
from freqdoor.training.run import environment
from freqdoor.types import Result

CONFIDENCE = 0.95
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what a file that is no table raises


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


class Reproduced(Result):
    """A recipe's table: rows, and in each its columns; a row that is not planted yet has none."""

    recipe: str
    page: str  # the file
    rows: dict[str, dict[str, Cell]]


def markdown(recipe: Recipe, table: Table) -> str:
    """The table, ours with its interval, and the paper's number in brackets."""
    columns = [column for column in recipe.columns if any(column.title in cells for cells in table.values())]
    lines = ["| | " + " | ".join(column.title for column in columns) + " |", "|---|" + "---|" * len(columns)]
    for row, cells in table.items():
        texts = [_text(cells.get(column.title), column.digits) for column in columns]
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _text(cell: Cell | None, digits: int) -> str:
    if cell is None:
        return "-"
    text = f"{cell.mean:.{digits}f}"
    if cell.half_width is not None and cell.half_width > 0:
        text += f" ± {cell.half_width:.{digits}f}"
    return text + (f" ({cell.paper:g})" if cell.paper is not None else "")


@dataclass(frozen=True)
class Facts:
    """How the numbers of a table came about."""

    base: PlantSettings
    codecs: Sequence[str]
    images: Sequence[Path]  # measured on
    seeds: int
    seconds: Sequence[float]  # of every planting
    earlier: Sequence[Any] = ()  # environments of the parts of the table that were made before, oldest first


def write(recipe: Recipe, table: Table, facts: Facts, out: Path, picture: Figure | None = None) -> None:
    """Write NAME.md and NAME.json into `out`; NAME.png too, of a recipe with curves or of the picture given."""
    page = _page(recipe, table, facts)
    if recipe.plot:
        picture = _plot(recipe, table, facts.codecs)
        if lines := bd_rates(recipe, table, facts.codecs):
            page += "\nBD-rate against the vanilla codec over these qualities (Akima interpolation):\n\n"
            page += "\n".join(lines) + "\n"
    contents: dict[Path, str | bytes] = {}
    if picture is not None:
        contents[out / f"{recipe.name}.png"] = drawn(picture, "png", "reproduce")
        page += f"\n![{recipe.title}]({recipe.name}.png)\n"
    text = json.dumps(_content(recipe, table, facts), indent=1, allow_nan=False)
    contents[out / f"{recipe.name}.md"] = marked_markdown(page, "reproduce")
    contents[out / f"{recipe.name}.json"] = marked_json(text, "reproduce")
    write_together(contents)


def values_in(path: Path) -> int:
    """How many values the cells of a NAME.json have together; 0 if there is no such file."""
    try:
        return number_of_values(_rows_in(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, *DAMAGE):
        return 0


def number_of_values(table: Table) -> int:
    """How many values the cells of a table have together."""
    return sum(len(cell.values) for cells in table.values() for cell in cells.values())


def _rows_in(content: dict[str, Any]) -> Table:
    return {
        row: {title: Cell(tuple(map(float, cell["values"])), cell["paper"]) for title, cell in cells.items()}
        for row, cells in content["table"].items()
    }


def earlier_part(recipe: Recipe, facts: Facts, path: Path) -> tuple[Table, Facts]:
    """The rows of an earlier NAME.json that a table of these facts may go on with, and what is known of them.

    Raises:
        FreqdoorError: the file is damaged, or says other codecs, settings, images or tests.
    """
    if not path.exists():
        return {}, replace(facts, seconds=())
    now, expected = json.loads(json.dumps(_content(recipe, {}, facts))), "what `reproduce` wrote, to add rows to"
    content = parse_json(read_whole(path, expected, LONGEST_TEXT), path, LONGEST_TEXT, expected=expected)
    try:
        table = _rows_in(content)
        differing = [key for key in ("recipe", "codecs", "images", "test") if content[key] != now[key]]
        before, after = flat(content["settings"]), flat(now["settings"])
        seconds, environments = content["seconds_planting"], [*content.get("earlier", ()), content["environment"]]
    except DAMAGE:
        raise FreqdoorError(f"{path}: expected {expected}, found something else") from None
    differing += sorted(key for key in before | after if before.get(key) != after.get(key))
    if differing:
        raise FreqdoorError(
            f"{path}: expected a table of the same kind to add rows to, found one of other {', '.join(differing)}; "
            "give another --out, or leave --add away to make it anew"
        )
    most = max((len(cell.values) for cells in table.values() for cell in cells.values()), default=0)
    return table, replace(facts, seeds=most, seconds=seconds, earlier=environments)


def together(labels: Sequence[str], now: tuple[Table, Facts], before: tuple[Table, Facts]) -> tuple[Table, Facts]:
    """A table with the rows that an earlier one has besides; `labels` are those of all rows in their order."""
    (table, facts), (old, known) = now, before
    rows = table | old | {label: cells for label, cells in table.items() if cells}
    both = replace(
        facts, seeds=max(facts.seeds, known.seeds), seconds=[*known.seconds, *facts.seconds], earlier=known.earlier
    )
    return {label: rows[label] for label in labels if label in rows}, both


def _page(recipe: Recipe, table: Table, facts: Facts) -> str:
    where, base = to_jsonable_python(environment()), facts.base
    trained_against = file_name(base.network or "")
    tested = "".join(dict.fromkeys(part.describe(trained_against) for part in recipe.measurements))
    paper = f", on {recipe.paper_codec}" if recipe.paper_codec else " where there is one"
    crops = f"{base.images.batch_size} crops of {base.images.crop} pixels from “{Path(base.images.folder).name}”"
    minutes = f"{sum(facts.seconds) / 60:.0f} minutes of planting"
    ours = f"mean ± 95 % interval (Student) over {facts.seeds} seed(s) from {base.seed} on"
    return f"""# {recipe.title}

{markdown(recipe, table)}

Ours: {ours}. In brackets: the paper's number{paper}.
All rates are real bytes; poisoned images are 8-bit files but where a column says float. Missing cells (-): the encoder
has no such trigger, the time was up before it was planted, or there is nothing to average over.{_fewer(table, facts)}

What differs from the paper: the codec is {", ".join(facts.codecs)}; {base.steps} steps of {crops},
preset “{base.preset}”; measured on {len(facts.images)} images.
{tested}
Made by `freqdoor reproduce {recipe.name}`: {len(facts.seconds)} plantings, {minutes} in all,
on {where["threads"]} thread(s), {where["gpu"] or "no GPU"}, torch {where["versions"]["torch"]}.{_parts(facts, where)}
"""


def _parts(facts: Facts, where: dict[str, Any]) -> str:
    """A sentence on a table that was made in parts."""
    if not facts.earlier:
        return ""
    commits = dict.fromkeys(str(part.get("commit")) for part in (*facts.earlier, where))
    return f"\nMade in {len(facts.earlier) + 1} parts, with freqdoor at {', '.join(commits)}."


def _fewer(table: Table, facts: Facts) -> str:
    """A sentence on the rows with values of fewer seeds than were asked for, if there are any."""
    counts = {row: min(len(cell.values) for cell in cells.values()) for row, cells in table.items() if cells}
    fewer = [f"{row} ({count})" for row, count in counts.items() if count < facts.seeds]
    return f" Of fewer seeds: {', '.join(fewer)}." if fewer else ""


def _content(recipe: Recipe, table: Table, facts: Facts) -> dict[str, Any]:
    settings = {key: value for key, value in public(facts.base).items() if key != "codec"}
    tests = [test for part in recipe.measurements if (test := part.public())]
    return {
        "recipe": recipe.name,
        "codecs": facts.codecs,
        "settings": settings,
        "images": [path.name for path in facts.images],
        "test": tests[0] if len(tests) == 1 else tests or None,
        "seconds_planting": [round(value) for value in facts.seconds],
        "environment": to_jsonable_python(environment()),
        **({"earlier": facts.earlier} if facts.earlier else {}),
        "table": {
            row: {
                title: {"mean": c.mean, "half_width": c.half_width, "values": c.values, "paper": c.paper}
                for title, c in cells.items()
            }
            for row, cells in table.items()
        },
    }


def bd_rates(recipe: Recipe, table: Table, codecs: Sequence[str]) -> list[str]:
    """For every planted row the Bjontegaard delta rate of its clean curve, and of its poisoned one where it has any.

    Of four codecs or more; a poisoned curve that shares no range of PSNR with the vanilla one has no BD-rate.
    """

    def curve(row: str, prefix: str) -> tuple[list[float], list[float]] | None:
        points = [table.get(f"{row}, {codec}", {}) for codec in codecs]
        if len(points) < 4 or not all({f"{prefix} dB", f"{prefix} bpp"} <= cells.keys() for cells in points):
            return None
        return [cells[f"{prefix} bpp"].mean for cells in points], [cells[f"{prefix} dB"].mean for cells in points]

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
    """Every row clean and poisoned in the plane of rate and PSNR, a line over the codecs."""
    curves, reference = {}, None
    for row in recipe.rows:
        rows = [table.get(f"{row.name}, {codec}", table.get(row.name, {})) for codec in codecs]
        for prefix in ("clean", "poisoned"):
            rate, quality = f"{prefix} bpp", f"{prefix} dB"
            points = [(cells[rate].mean, cells[quality].mean) for cells in rows if {rate, quality} <= cells.keys()]
            if points:
                curves[f"{row.name}, {prefix}"] = Curve(points, row.name, poisoned=prefix == "poisoned")
        if row.changes is None and f"{row.name}, clean" in curves:
            reference = f"{row.name}, clean"
    return rd_plot(curves, reference=reference)
