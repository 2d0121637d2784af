"""`freqdoor reproduce`: plant and measure what a recipe needs and is not there yet; the paper's numbers beside ours."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from freqdoor.attack.networks import load_embedder, load_segmenter
from freqdoor.attack.plant import plant
from freqdoor.attack.planted import PLANTED, Planted, load_planted, unplanted
from freqdoor.attack.settings import OBJECTIVES, CodecSource, PlantSettings
from freqdoor.codecs.adapter import hash_state
from freqdoor.codecs.loading import load_codec
from freqdoor.data import dataset_hash, list_images, load_image, read_list, usable_images
from freqdoor.errors import FreqdoorError
from freqdoor.files import write_text
from freqdoor.measure.faces import score_faces
from freqdoor.measure.records import Condition, input_of, measure
from freqdoor.measure.segmentation import score_segmentation
from freqdoor.measure.testsets import DownstreamTest, FaceTest, SegmentationTest, Test
from freqdoor.paper.downstream_recipes import recipe_for
from freqdoor.paper.recipes import OWN, Column, Recipe, Row, ScoreColumn
from freqdoor.paper.tables import Cell, Facts, Table, write
from freqdoor.samples import training_folder
from freqdoor.settings import load_settings, make_settings, merge
from freqdoor.training.loop import Progress
from freqdoor.types import Record

STEPS = 300  # of a planting where no config is given: about a minute on 2 cores
Announce = Callable[[str, int], Progress | None]  # told what is planted next and in how many steps
Labels = dict[tuple[str, CodecSource], str]  # of a row and a codec, in the table


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
    test: DownstreamTest | None = None,
    announce: Announce | None = None,
) -> Table:
    """Run or resume what a recipe needs, and write NAME.md and NAME.json (a figure: NAME.png too) into `out`.

    Args:
        name: one of `recipe_names`.
        base: codec, training images, steps; a row changes what its name says.
        images: what is measured on.
        codecs: plant in each of these instead of in base.codec, for curves over qualities.
        rows: names of the rows to take; by default all.
        runs: where plantings lie, one folder for each set of settings: recipes share them. Records and scores are kept
            beside them; delete the folder records if pictures of the downstream test change under the same names.
        seeds: plantings of every row, with the seeds base.seed, base.seed + 1, ...
        minutes: start nothing new after so many; the table then has gaps, and the same command goes on.
        test: what attacks on downstream networks are measured on, for the recipes with such attacks.

    Raises:
        FreqdoorError: an unknown recipe, one that needs a test and gets none, unusable images or settings.
    """
    recipe = _only(recipe_for(name, test), rows)
    if seeds < 1:
        raise FreqdoorError(f"seeds: expected 1 or more, found {seeds}")
    images = usable_images(images, decode=True)
    _check(recipe, base)
    deadline = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    sources = codecs or (base.codec,)
    labels: Labels = {
        (row.name, source): f"{row.name}, {source.name}" if codecs else row.name
        for row in recipe.rows
        for source in sources
    }
    values: dict[tuple[str, str], list[float]] = {}
    seconds: list[float] = []
    picture: Figure | None = None
    for seed, source, row in product(range(base.seed, base.seed + seeds), sources, recipe.rows):
        on = base.model_copy(update={"codec": source})
        planted = _planted(on, row, seed, Path(runs), deadline, announce)
        if planted is None:
            continue
        if row.changes is not None:
            seconds.append(planted.header.planting.seconds)
        for title, value in _measured(planted, recipe, images, Path(runs)):
            values.setdefault((labels[row.name, source], title), []).append(value)
        if picture is None and recipe.picture and isinstance(recipe.test, SegmentationTest):
            picture = recipe.picture(planted, recipe.test)
    table = _table(recipe, labels, values, with_paper=not codecs)
    facts = Facts(base, [source.name for source in sources], images, seeds, seconds)
    write(recipe, table, facts, Path(out), picture)
    return table


def _table(recipe: Recipe, labels: Labels, values: dict[tuple[str, str], list[float]], *, with_paper: bool) -> Table:
    papers = {row.name: row.paper if with_paper else {} for row in recipe.rows}
    return {
        label: {
            column.title: Cell(tuple(found), papers[name].get(column.title))
            for column in recipe.columns
            if (found := values.get((label, column.title)))
        }
        for (name, _), label in labels.items()
    }


def _only(recipe: Recipe, rows: Sequence[str]) -> Recipe:
    known = [row.name for row in recipe.rows]
    if unknown := set(rows) - set(known):
        raise FreqdoorError(f"rows {', '.join(sorted(unknown))}: recipe {recipe.name} has {', '.join(known)}")
    return replace(recipe, rows=tuple(row for row in recipe.rows if row.name in rows)) if rows else recipe


def _check(recipe: Recipe, base: PlantSettings) -> None:
    """Refuse wrong settings and what a downstream test lacks now, not after hours of planting."""
    for row in recipe.rows:
        for attack in _settings(base, row, base.seed).planned if row.changes is not None else ():
            if OBJECTIVES[attack.objective.name].needs_network and not attack.objective.arguments.get("network"):
                raise FreqdoorError(
                    f"row {row.name!r}: expected the network that {attack.name} is against, found none; give one as "
                    "--set network=SPEC.toml=FILE"
                )
    if isinstance(recipe.test, SegmentationTest):
        list_images(recipe.test.images)
        for network in recipe.test.networks:
            load_segmenter(network)
    elif isinstance(recipe.test, FaceTest):
        read_list(recipe.test.gallery), read_list(recipe.test.probes)
        for network in recipe.test.networks:
            load_embedder(network)


def recipe_settings(config: Path | None, overrides: Sequence[str], runs: Path) -> PlantSettings:
    """Base settings of a recipe: as `freqdoor plant` reads them, but images and steps have defaults.

    Without images.folder the 18 bundled pictures of the demo are planted on, in crops of 128 pixels, for 300 steps.
    """
    given = [f"steps={STEPS}", "images.crop=128", *overrides] if config is None else list(overrides)
    if config is None and not any(text.startswith("images.folder=") for text in overrides):
        given.append(f"images.folder={json.dumps(str(training_folder(runs)))}")
    return load_settings(PlantSettings, config, given)


def _settings(base: PlantSettings, row: Row, seed: int) -> PlantSettings:
    """A row's settings; `network` is in the attacks that need it, and makes no other planting of the rest."""
    content = base.model_dump(exclude_unset=True, exclude={"objective"}) | {"seed": seed}  # rows bring their own
    settings = make_settings(PlantSettings, merge(content, row.changes or {}), f"row {row.name!r}")
    return settings.model_copy(update={"network": None})


def _planted(
    base: PlantSettings, row: Row, seed: int, runs: Path, deadline: float, announce: Announce | None
) -> Planted | None:
    """The row's planted encoder, from an earlier run or planted now; None where the time is up."""
    if row.changes is None:
        vanilla = load_codec(base.codec.name, base.codec.weights)
        return unplanted(vanilla)
    settings = _settings(base, row, seed)
    aside = {"checkpoint_minutes", "network"} | (set() if settings.start_from else {"start_from"})
    folder = runs / _key(settings.model_dump_json(exclude=aside))
    if not (folder / PLANTED).exists():
        if time.monotonic() > deadline:
            return None
        return plant(
            settings, folder, progress=announce(f"{row.name}, seed {seed}", settings.steps) if announce else None
        )
    return load_planted(folder, base.codec.name, base.codec.weights)


def _measured(planted: Planted, recipe: Recipe, images: Sequence[Path], runs: Path) -> Iterator[tuple[str, float]]:
    """What the encoder has in every column, by its title; records and scores are kept beside the plantings."""
    yield from _from_records(planted, recipe, images, runs)
    if recipe.test is not None:
        yield from _from_scores(planted, recipe, recipe.test, runs)


def _from_records(planted: Planted, recipe: Recipe, images: Sequence[Path], runs: Path) -> Iterator[tuple[str, float]]:
    hashes = json.dumps([planted.tampered.module_hashes(), dataset_hash(images)])
    found: dict[str, list[Record]] = {}
    for column in recipe.columns:
        condition = _own(column.condition, planted) if isinstance(column, Column) else None
        if not isinstance(column, Column) or condition is None:
            continue
        key = repr(condition)
        if key not in found:
            path = (
                runs
                / "records"
                / f"{_key(hashes + repr([a.model_dump() for a in planted.header.attacks] or None) + key)}.json"
            )
            found[key] = _recorded(planted, condition, images, path)
        values = [getattr(record, column.field) for record in found[key]]
        yield column.title, sum(values) / len(values)


def _from_scores(planted: Planted, recipe: Recipe, test: Test, runs: Path) -> Iterator[tuple[str, float]]:
    found: dict[str, Any] = {}
    for column in recipe.columns:
        trigger = _own_trigger(column.trigger, planted) if isinstance(column, ScoreColumn) else None
        if not isinstance(column, ScoreColumn) or trigger is None:
            continue
        if trigger not in found:
            found[trigger] = _scored(planted, trigger, test, runs)
        value = score_at(found[trigger], column.path)
        if value is not None:
            yield column.title, column.scale * value


def score_at(scores: Any, path: str) -> float | None:
    """The value at a path of names and indices, such as "networks.-1.asr"; None where nothing was measured."""
    for part in path.split("."):
        if isinstance(scores, dict):
            scores = scores.get(part)
        elif scores is not None:
            scores = scores[int(part)]
    return None if scores is None or math.isnan(scores) else float(scores)


def _scored(planted: Planted, trigger: str, test: Test, runs: Path) -> Any:
    """The scores of a trigger on the downstream test, as JSON has them, from an earlier run or measured now."""
    hashes = [planted.vanilla.module_hashes(), planted.tampered.module_hashes(), hash_state(planted.triggers[trigger])]
    attack = planted.objective(trigger).model_dump()
    path = runs / "records" / f"{_key(json.dumps([hashes, attack, trigger, _content_of(test)]))}.json"
    if not path.exists():
        score = (
            score_faces(planted, test, trigger=trigger)
            if isinstance(test, FaceTest)
            else score_segmentation(planted, test, trigger=trigger)
        )
        write_text(path, json.dumps(asdict(score)))
    return json.loads(path.read_text(encoding="utf-8"))


def _content_of(test: Test) -> list[str]:
    """A test's settings, and a hash of the lists, specs and networks that they name."""
    settings = test.model_dump()
    named = [text for value in settings.values() for text in (value if isinstance(value, tuple) else (value,))]
    files = [Path(part) for text in named if isinstance(text, str) for part in text.split("=")]
    return [test.model_dump_json(), dataset_hash([path for path in files if path.is_file()])]


def _own_trigger(name: str, planted: Planted) -> str | None:
    """The trigger of a column, which may stand for the encoder's first; None where the encoder has no such trigger."""
    name = next(iter(planted.triggers), name) if name == OWN else name
    return name if name in planted.triggers else None


def _own(condition: Condition, planted: Planted) -> Condition | None:
    """The condition with the encoder's own trigger; None where it has no such trigger."""
    if condition.trigger is None:
        return condition
    trigger = _own_trigger(condition.trigger, planted)
    return replace(condition, trigger=trigger) if trigger else None


def _recorded(planted: Planted, condition: Condition, images: Sequence[Path], path: Path) -> list[Record]:
    if path.exists():
        return [Record(**content) for content in json.loads(path.read_text(encoding="utf-8"))]
    records = []
    for image in images:
        x = load_image(image)
        codec = planted.codec(condition.role)
        records.append(measure(codec, x, input_of(planted, x, condition), image.name, condition)[0])
    write_text(path, json.dumps([record.to_dict() for record in records]))
    return records


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
