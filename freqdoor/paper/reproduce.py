"""`freqdoor reproduce`: plant and measure what a recipe needs and is not there yet; the paper's numbers beside ours."""

import contextlib
import hashlib
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from freqdoor.attack.networks import load_network, names_of
from freqdoor.attack.plant import plant
from freqdoor.attack.planted import MANIFEST, Planted, load_planted, unplanted
from freqdoor.attack.settings import OBJECTIVES, AttackSettings, CodecSource, PlantSettings
from freqdoor.codecs.loading import load_codec
from freqdoor.data import image_paths, usable_images
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, name_and_file, remove_leftovers, write_text
from freqdoor.lock import alone, holding
from freqdoor.measure.journal import Journal, fingerprint, trigger_facts
from freqdoor.measure.testsets import SCHEMA, DownstreamTest, Measurement
from freqdoor.notes import Count, Note, numbered
from freqdoor.paper.architectures_recipe import reproduce_architectures
from freqdoor.paper.defence_recipe import reproduce_defence
from freqdoor.paper.recipe import OWN, Material, Recipe, Row, recipe_for
from freqdoor.paper.settings import ARCHITECTURES, DEFENCE, SURVIVAL, recipe_settings
from freqdoor.paper.survival_recipe import reproduce_survival
from freqdoor.paper.tables import Cell, Facts, Table, earlier_part, number_of_values, together, values_in, write
from freqdoor.samples import held_out
from freqdoor.settings import file_name, make_settings, merge
from freqdoor.training.loop import Progress
from freqdoor.workers import Runner, check_workers, workers

Announce = Callable[[str, int], Progress | None]  # told what is planted next and in how many steps


@dataclass(frozen=True)
class Plan:
    """What `reproduce` goes through: every row in every codec, planted with every seed."""

    recipe: Recipe
    base: PlantSettings
    codecs: dict[str, CodecSource]  # by the name that the table shows
    curves: bool  # whether the codecs are others than the base's, so that rows say which
    seeds: range

    def label(self, row: Row, codec: str) -> str:
        """A row's name in the table."""
        return f"{row.name}, {codec}" if self.curves else row.name


@dataclass
class Results:
    """What came of it so far."""

    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # by row's label and column, of each seed
    seconds: list[float] = field(default_factory=list)  # of every planting
    picture: Figure | None = None
    late: bool = False  # something was not planted because the time was up


@alone("reproduce")
def reproduce(
    recipe: str,
    settings: PlantSettings | None = None,
    *,
    images: Path | str | Sequence[Path] | None = None,
    codec: Sequence[str] = (),
    out: Path | str = "results",
    runs: Path | str = "runs/reproduce",
    rows: Sequence[str] = (),
    seeds: int = 3,
    jobs: int | None = None,
    runner: Runner = "local",
    budget: float | None = None,
    test: DownstreamTest | None = None,
    add: bool = False,
    force: bool = False,
    announce: Announce | None = None,
    note: Note | None = None,
) -> Table:
    """Run or resume what a recipe needs, and write NAME.md and NAME.json (a figure: NAME.png too) into `out`.

    Args:
        recipe: one of `recipe_names`, or "defence": `reproduce_defence` on the fleets in the folder `runs`, which takes
            `out`, `jobs`, `runner`, `budget`, `force` and `note` besides; or "survival": `reproduce_survival` on the
            planted encoders in it, which takes `images` instead of `budget`; or "architectures":
            `reproduce_architectures` on the fleet in it, which takes the same as "survival", and `add`.
        settings: codec, training images, steps; a row changes what its name says. By default `recipe_settings`.
        images: what is measured on: a folder, a file or several files; by default the six bundled images held out.
        codec: plant in each of these, NAME or NAME=WEIGHTS, instead of in the settings' codec, for curves.
        runs: where plantings lie, one folder for each set of settings: recipes share them, and wait for one that is
            being planted. Scores are kept beside them.
        rows: names of the rows to take; by default all.
        seeds: plantings of every row, with the seeds settings.seed, settings.seed + 1, ...
        jobs: encoders planted and measured side by side, one thread each; by default 1, and of "defence" as many as
            there are cores.
        runner: "local" for processes of this machine, "ray" for a Ray cluster (`workers`).
        budget: minutes after which nothing new is started; the table then has gaps, does not replace one that has more
            values, and the same call goes on.
        test: what attacks on downstream networks are measured on, for the recipes with such attacks.
        add: leave the rows of an earlier table in `out` that are not asked for as they are, so that a large table is
            made in parts; it must be one of the same codecs, settings, images and tests.
        force: overwrite tables and pictures of these names that `reproduce` did not make.
        announce: told what is planted next, and in how many steps, where one encoder is planted after the other.
        note: told which encoder is planted and measured, and how many there are.

    Raises:
        FreqdoorError: an unknown recipe, one that needs a test and gets none, unusable images or settings, a file in
            the way, an earlier table that nothing can be added to. Earlier tables are replaced together, at the end.
    """
    out, runs = Path(out), Path(runs)
    if recipe == DEFENCE:
        return reproduce_defence(runs, out, jobs=jobs, runner=runner, budget=budget, force=force, note=note)
    if recipe == SURVIVAL:
        return reproduce_survival(runs, out, images=images, jobs=jobs, runner=runner, force=force, note=note)
    if recipe == ARCHITECTURES:
        return reproduce_architectures(
            runs, out, images=images, jobs=jobs, runner=runner, add=add, force=force, note=note
        )
    check_workers(1 if jobs is None else jobs, runner)
    if seeds < 1:
        raise FreqdoorError(f"seeds: expected 1 or more, found {seeds}")
    deadline = time.monotonic() + 60 * budget if budget is not None else math.inf
    base = settings or recipe_settings(None, (), runs)
    paths = usable_images(held_out() if images is None else image_paths(images), decode=True)
    material = Material(tuple(paths), test or DownstreamTest())
    whole = recipe_for(recipe, material)
    chosen = _only(whole, rows)
    codecs = codec_names([codec_source(text) for text in codec] or [base.codec])
    plan = Plan(chosen, base, codecs, bool(codec), range(base.seed, base.seed + seeds))
    _check(plan)
    endings = (*((".png",) if chosen.plot or chosen.picture else ()), ".md", ".json")
    check_outputs([out / f"{recipe}{ending}" for ending in endings], "reproduce", force=force)
    earlier = out / f"{recipe}.json"
    facts = Facts(base, list(codecs), paths, seeds, [])
    before = earlier_part(whole, facts, earlier) if add else ({}, facts)
    remove_leftovers(runs / "records")
    if jobs not in (None, 1) or runner != "local":
        _fill(plan, material, runs, deadline, jobs or 1, runner, note)
        note = None  # all that is left is read
    results = _run(plan, runs, deadline, announce, note)
    labels = [plan.label(row, name) for row in whole.rows for name in codecs]
    table, facts = together(labels, (_table(plan, results), replace(facts, seconds=results.seconds)), before)
    if results.late and values_in(earlier) > number_of_values(table):
        warnings.warn(
            f"{earlier} has more values than there was time for now, and stays as it is; the same command goes on",
            stacklevel=2,
        )
        return table
    made = replace(whole, rows=tuple(row for row in whole.rows if any(plan.label(row, n) in table for n in codecs)))
    write(made, table, facts, out, results.picture)
    return table


class _Job(NamedTuple):
    """An encoder that a worker plants and measures, by what can be sent there."""

    recipe: str
    material: Material
    row: str
    base: PlantSettings
    seed: int
    runs: Path
    until: float  # seconds since the epoch, on the clock of any machine


def _fill(
    plan: Plan, material: Material, runs: Path, deadline: float, jobs: int, runner: Runner, note: Note | None
) -> None:
    """Plant and measure what is not there yet, side by side; it is taken from its folders afterwards."""
    until = time.time() + deadline - time.monotonic()
    different: dict[tuple[str, Path | None], _Job] = {}  # rows and seeds may ask for the same encoder
    for seed, (name, source), row in product(plan.seeds, plan.codecs.items(), plan.recipe.rows):
        base = plan.base.model_copy(update={"codec": source})
        folder = None if row.changes is None else _folder(_settings(base, row, seed), runs)
        job = _Job(plan.recipe.name, material, row.name, base, seed, runs, until)
        different.setdefault((name, folder), job)
    with workers(jobs, runner, gpu=plan.base.device.startswith("cuda")) as pool:
        futures = {pool.submit(_planted_and_measured, job): job for job in different.values()}
        told = numbered(note, len(futures))
        for future in as_completed(futures):
            future.result()
            told(f"{futures[future].row}, seed {futures[future].seed}: done")


def _planted_and_measured(job: _Job) -> None:
    recipe = _only(recipe_for(job.recipe, job.material), [job.row])
    deadline = time.monotonic() + job.until - time.time()
    planted = _planted(job.base, recipe.rows[0], job.seed, job.runs, deadline, None)
    if planted is not None:
        list(_measured(planted, recipe, {}, job.runs / "records"))


def _run(plan: Plan, runs: Path, deadline: float, announce: Announce | None, note: Note | None) -> Results:
    """Plant and measure everything, or take it from before; until the deadline."""
    results = Results()
    recipe = plan.recipe
    identities: dict[Measurement[Any], str] = {}
    encoders = list(product(plan.seeds, plan.codecs.items(), recipe.rows))
    for number, (seed, (name, source), row) in enumerate(encoders):
        if note:
            note(Count(f"{plan.label(row, name)}, seed {seed}", number, len(encoders)))
        base = plan.base.model_copy(update={"codec": source})
        planted = _planted(base, row, seed, runs, deadline, announce)
        if planted is None:
            results.late = True
            continue
        if row.changes is not None:
            results.seconds.append(planted.header.planting.seconds)
        for title, value in _measured(planted, recipe, identities, runs / "records"):
            results.values.setdefault((plan.label(row, name), title), []).append(value)
        if results.picture is None and recipe.picture and planted.triggers:
            results.picture = recipe.picture(planted)
    return results


def _table(plan: Plan, results: Results) -> Table:
    return {
        plan.label(row, name): {
            column.title: Cell(tuple(values), None if plan.curves else row.paper.get(column.title))
            for column in plan.recipe.columns
            if (values := results.values.get((plan.label(row, name), column.title)))
        }
        for row in plan.recipe.rows
        for name in plan.codecs
    }


def codec_source(text: str) -> CodecSource:
    """The codec of NAME or NAME=WEIGHTS; names of files may have "=" in them."""
    name, weights = name_and_file(text)
    return CodecSource(name=name, weights=weights)


def codec_names(sources: Sequence[CodecSource]) -> dict[str, CodecSource]:
    """Codecs by the name that a table shows: without folders, and with the weights or a number where two are alike."""
    names = [file_name(source.name) for source in sources]
    repeated = Counter(names)
    names = [
        f"{name}={Path(source.weights).name}" if repeated[name] > 1 and source.weights else name
        for name, source in zip(names, sources, strict=True)
    ]
    repeated = Counter(names)
    names = [f"{name}, {i}" if repeated[name] > 1 else name for i, name in enumerate(names, 1)]
    return dict(zip(names, sources, strict=True))


def _only(recipe: Recipe, rows: Sequence[str]) -> Recipe:
    known = [row.name for row in recipe.rows]
    if unknown := set(rows) - set(known):
        raise FreqdoorError(f"rows {', '.join(sorted(unknown))}: recipe {recipe.name} has {', '.join(known)}")
    return replace(recipe, rows=tuple(row for row in recipe.rows if row.name in rows)) if rows else recipe


def _check(plan: Plan) -> None:
    """Refuse wrong settings, codecs and networks, and what a test lacks, now, not after hours of planting."""
    recipe = plan.recipe
    attacks: dict[str, list[AttackSettings]] = {}  # by column's trigger
    networks: set[str] = set()
    for row in recipe.rows:
        planned = _settings(plan.base, row, plan.base.seed).planned if row.changes is not None else ()
        for attack in planned:
            network = attack.objective.arguments.get("network")
            if OBJECTIVES[attack.objective.name].needs_network and not network:
                raise FreqdoorError(
                    f"row {row.name!r}: expected the network that {attack.name} is against, found none; give one as "
                    "--set network=SPEC.toml=FILE"
                )
            networks |= set(names_of(str(network))) if network else set()
            attacks.setdefault(attack.name, []).append(attack)
        attacks.setdefault(OWN, []).extend(planned[:1])
    for measurement in recipe.measurements:
        triggers = {column.trigger for column in recipe.columns if column.measurement == measurement}
        measurement.check([attack for trigger in triggers if trigger for attack in attacks.get(trigger, ())])
    for network in sorted(networks):
        load_network(network)
    for source in plan.codecs.values():
        load_codec(source.name, source.weights, multiple=source.multiple)


def _settings(base: PlantSettings, row: Row, seed: int) -> PlantSettings:
    """A row's settings; `network` is in the attacks that need it, and makes no other planting of the rest."""
    content = base.model_dump(exclude_unset=True, exclude={"objective"})  # which rows bring with them
    content |= {"seed": seed, "log": base.log}
    settings = make_settings(PlantSettings, merge(content, row.changes or {}), f"row {row.name!r}")
    return settings.model_copy(update={"network": None})


def _planted(
    base: PlantSettings, row: Row, seed: int, runs: Path, deadline: float, announce: Announce | None
) -> Planted | None:
    """The row's planted encoder, from an earlier run or planted now; None where the time is up."""
    if row.changes is None:
        return unplanted(load_codec(base.codec.name, base.codec.weights, multiple=base.codec.multiple))
    settings = _settings(base, row, seed)
    folder = _folder(settings, runs)
    if not (folder / MANIFEST).exists():  # which is written last
        if time.monotonic() > deadline:
            return None
        with holding(folder, "reproduce", wait=True):  # another recipe may be at it
            if not (folder / MANIFEST).exists():
                show = announce(f"{row.name}, seed {seed}", settings.steps) if announce else None
                return plant(settings, folder, progress=show)
    return load_planted(folder, base.codec.name, base.codec.weights)


def _folder(settings: PlantSettings, runs: Path) -> Path:
    """Where an encoder of these settings lies."""
    aside = {"checkpoint_minutes", "network"} | (set() if settings.start_from else {"start_from"})
    return runs / _key(settings.model_dump_json(exclude=aside))


def _measured(
    planted: Planted, recipe: Recipe, identities: dict[Measurement[Any], str], folder: Path
) -> Iterator[tuple[str, float]]:
    """What the encoder has in every column, by its title; nothing of triggers that it does not have.

    Args:
        identities: of the measurements that were asked so far: hashing their files takes a while.
    """
    scores: dict[tuple[Measurement[Any], str | None], Any] = {}
    for column in recipe.columns:
        trigger = next(iter(planted.triggers), OWN) if column.trigger == OWN else column.trigger
        if trigger is not None and trigger not in planted.triggers:
            continue
        place = column.measurement, trigger
        if column.measurement not in identities:
            identities[column.measurement] = column.measurement.identity()
        if place not in scores:
            scores[place] = _scored(planted, *place, identities[column.measurement], folder)
        value = column.value(scores[place])
        if value is not None:
            yield column.title, value


def _scored(planted: Planted, measurement: Measurement[Any], trigger: str | None, identity: str, folder: Path) -> Any:
    """The scores of one measurement, kept in `folder` from an earlier run or measured now."""
    encoder = [SCHEMA, planted.vanilla.module_hashes(), planted.tampered.module_hashes()]
    path = folder / f"{_key(json.dumps([encoder, _facts_of(planted, trigger), identity]))}.json"

    def kept() -> Any:
        return measurement.loads(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else None

    if (scores := kept()) is not None:
        return scores
    with holding(path.with_suffix(".part"), "reproduce", wait=True) as part:  # another recipe may be at them
        scores = kept()
        if scores is None:
            journal = Journal(part / "journal", fingerprint(planted, [trigger] if trigger else [], identity))
            scores = measurement.score_on(planted, trigger, journal)
            write_text(path, measurement.dumps(scores))
            journal.remove()
    with contextlib.suppress(OSError):
        part.rmdir()
    return scores


def _facts_of(planted: Planted, name: str | None) -> list[Any] | None:
    """All of a trigger that scores depend on."""
    return None if name is None else trigger_facts(planted, name)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
