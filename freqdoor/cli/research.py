"""The verbs of research: reproduce, analyse, pgd."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

import freqdoor
from freqdoor.cli.options import (
    NOTHING_KEPT,
    Force,
    Out,
    Overrides,
    Planted,
    RunnerName,
    TriggerName,
    VanillaName,
    Weights,
    load_torch,
    verb,
)
from freqdoor.cli.terminal import live, note, say, say_page
from freqdoor.files import read_text, unmarked
from freqdoor.listing import names
from freqdoor.paper.settings import DEFENCE, OF_ENCODERS, recipe_names, recipe_settings
from freqdoor.settings import load_settings


@verb(kept="what is planted and measured so far is kept, and the same command goes on after it")
def reproduce(
    recipe: Annotated[
        str,
        typer.Argument(
            autocompletion=lambda: list(names("recipes").names),
            help=f"One of {', '.join([*recipe_names(), *OF_ENCODERS])}.",
        ),
    ],
    config: Annotated[Path | None, typer.Argument(help="Settings as for plant; rows change theirs.")] = None,
    images: Annotated[Path | None, typer.Option(help="Measured on; by default six bundled Kodak images.")] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="Plant in this codec, or in NAME=WEIGHTS; repeatable for curves.")
    ] = None,
    out: Out = Path("results"),
    runs: Annotated[Path, typer.Option(help="Where plantings are kept; recipes share them.")] = Path("runs/reproduce"),
    rows: Annotated[str | None, typer.Option(help="Names of rows to take, separated by ';'; by default all.")] = None,
    seeds: Annotated[int, typer.Option(help="Plantings of every row.")] = 3,
    jobs: Annotated[
        int | None,
        typer.Option(help=f"Encoders planted and measured side by side; by default 1, of {DEFENCE} all cores."),
    ] = None,
    runner: RunnerName = "local",
    budget: Annotated[float | None, typer.Option(help="Start no planting after so many minutes; go on later.")] = None,
    test: Annotated[
        Path | None,
        typer.Option(help="TOML file of what downstream attacks are measured on: tables segmentation and faces."),
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Leave rows of the earlier table that are not asked for as they are.")
    ] = False,
    force: Force = False,
    overrides: Overrides = None,
) -> object:
    """Reproduce a table or figure: run or resume what is missing, the paper's column beside ours."""
    settings = recipe_settings(config, overrides or (), runs) if recipe not in OF_ENCODERS else None
    networks = load_settings(freqdoor.DownstreamTest, test) if test else None
    load_torch()
    with ExitStack() as shown:

        def announce(what: str, steps: int) -> Callable[[int, dict[str, float]], None]:
            shown.close()
            return shown.enter_context(live(steps, what))

        table = freqdoor.reproduce(
            recipe,
            settings,
            images=images,
            codec=codec or (),
            out=out,
            runs=runs,
            rows=[name.strip() for name in (rows or "").split(";") if name.strip()],
            seeds=seeds,
            jobs=jobs,
            runner=runner,
            budget=budget,
            test=networks,
            add=add,
            force=force,
            announce=announce,
            note=note,
        )
    page = out / f"{recipe}.md"
    say_page(unmarked(read_text(page)))
    if missing := [row for row, cells in table.items() if not cells]:
        say(f"Not planted yet: {', '.join(missing)}; the same command goes on.")
    say(f"Table: {page}")
    return freqdoor.Reproduced(recipe=recipe, page=str(page), rows=table)


@verb(kept=NOTHING_KEPT)
def pgd(
    planted: Planted,
    images: Annotated[Path, typer.Option(help="Folder of images to attack.")],
    steps: Annotated[int, typer.Option(help="Passes through the codec for every image.")] = 50,
    codec: VanillaName = None,
    weights: Weights = None,
) -> object:
    """Compare a planted encoder's trigger with per-image attacks (PGD) on the vanilla encoder: cost and effect."""
    load_torch()
    rows = freqdoor.pgd(planted, images, steps=steps, codec=codec, weights=weights, note=note)
    say_page(freqdoor.comparison_table(rows))
    return freqdoor.Comparisons(rows=tuple(rows))


@verb(kept=NOTHING_KEPT)
def analyse(
    planted: Planted,
    images: Annotated[Path, typer.Option(help="Folder of images to analyse the attack on.")],
    out: Out,
    trigger: TriggerName = None,
    codec: VanillaName = None,
    weights: Weights = None,
    force: Force = False,
) -> object:
    """Show how a trigger works: spectrum, bits per latent channel, the estimate's ceiling, encode time, survival."""
    load_torch()
    analysis = freqdoor.analyse(
        planted, images, out, trigger=trigger, codec=codec, weights=weights, force=force, note=note
    )
    say(
        f"{analysis.trigger}: a poisoned image takes {analysis.encoding.ratio:.2f} times as long to encode as a clean "
        f"one; {100 * analysis.ceiling['poisoned'].share_of_bits:.1f} % of its estimated bits are at the estimate's "
        "ceiling"
    )
    say(f"Analysis: {out / 'analysis.html'}")
    return analysis
