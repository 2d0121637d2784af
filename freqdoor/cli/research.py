"""The verbs of research: reproduce, analyse, pgd."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from freqdoor.attack.planted import load_planted
from freqdoor.cli.options import Out, Overrides, Planted, TriggerName, VanillaName, Weights, app, live, note, say
from freqdoor.data import list_images
from freqdoor.measure.analysis import PAGE as ANALYSIS
from freqdoor.measure.analysis import analyse as run_analyse
from freqdoor.measure.pgd import compare, comparison_table
from freqdoor.measure.testsets import DownstreamTest
from freqdoor.paper.names import recipe_names
from freqdoor.paper.reproduce import recipe_settings
from freqdoor.paper.reproduce import reproduce as run_reproduce
from freqdoor.settings import load_settings
from freqdoor.training.loop import Progress


@app.command()
def reproduce(
    recipe: Annotated[str, typer.Argument(help=f"One of {', '.join(recipe_names())}.")],
    config: Annotated[Path | None, typer.Argument(help="Settings as for plant; rows change theirs.")] = None,
    images: Annotated[Path | None, typer.Option(help="Measured on; by default six bundled Kodak images.")] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="Plant in this codec, or in NAME=WEIGHTS; repeatable for curves.")
    ] = None,
    out: Out = Path("results"),
    runs: Annotated[Path, typer.Option(help="Where plantings are kept; recipes share them.")] = Path("runs/reproduce"),
    rows: Annotated[str | None, typer.Option(help="Names of rows to take, separated by ';'; by default all.")] = None,
    seeds: Annotated[int, typer.Option(help="Plantings of every row.")] = 3,
    budget: Annotated[float | None, typer.Option(help="Start no planting after so many minutes; go on later.")] = None,
    test: Annotated[
        Path | None,
        typer.Option(help="TOML file of what downstream attacks are measured on: tables [segmentation] and [faces]."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Reproduce a table or figure: run or resume what is missing, the paper's column beside ours."""
    settings = recipe_settings(config, overrides or (), runs)
    chosen = [name.strip() for name in (rows or "").split(";") if name.strip()]
    with ExitStack() as shown:

        def announce(what: str, steps: int) -> Progress:
            shown.close()
            return shown.enter_context(live(steps, what))

        table = run_reproduce(
            recipe,
            settings,
            images=images,
            codec=codec or (),
            out=out,
            rows=chosen,
            runs=runs,
            seeds=seeds,
            budget=budget,
            test=load_settings(DownstreamTest, test) if test else None,
            announce=announce,
        )
    page = out / f"{recipe}.md"
    missing = [row for row, cells in table.items() if not cells]
    say(page.read_text(encoding="utf-8"))
    if missing:
        say(f"Not planted yet: {', '.join(missing)}; the same command goes on.")
    say(f"Table: {page}")


@app.command()
def pgd(
    planted: Planted,
    images: Annotated[Path, typer.Option(help="Folder of images to attack.")],
    steps: Annotated[int, typer.Option(help="Passes through the codec for every image.")] = 50,
    codec: VanillaName = None,
    weights: Weights = None,
) -> None:
    """Compare a planted encoder's trigger with per-image attacks (PGD) on the vanilla encoder: cost and effect."""
    rows = []
    for row in compare(load_planted(planted, codec, weights), list_images(images), steps=steps):
        rows.append(row)
        note(f"{row.record.image}: {row.attack}")
    say(comparison_table(rows))


@app.command()
def analyse(
    planted: Planted,
    images: Annotated[Path, typer.Option(help="Folder of images to analyse the attack on.")],
    out: Out,
    trigger: TriggerName = None,
    codec: VanillaName = None,
    weights: Weights = None,
) -> None:
    """Show how a trigger works: spectrum, bits per latent channel, the estimate's ceiling, encode time, survival."""
    loaded = load_planted(planted, codec, weights)
    result = run_analyse(loaded, list_images(images), out, trigger=trigger, note=note)
    ceiling = result["ceiling"]["poisoned"]
    say(
        f"{result['trigger']}: a poisoned image takes {result['encoding']['ratio']:.2f} times as long to encode as a "
        f"clean one; {100 * ceiling['share_of_bits']:.1f} % of its estimated bits are at the estimate's ceiling"
    )
    say(f"Analysis: {out / ANALYSIS}")
