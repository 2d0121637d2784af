"""The verbs of an attack: demo, plant, evaluate, poison, report."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from freqdoor.attack.plant import plant as run_plant
from freqdoor.attack.settings import PlantSettings
from freqdoor.cli.options import (
    Broken,
    Config,
    Out,
    Overrides,
    Planted,
    TriggerName,
    VanillaName,
    Weights,
    app,
    console,
    live,
    note,
    print_summary,
    say,
)
from freqdoor.demonstration import STEPS
from freqdoor.demonstration import demo as run_demo
from freqdoor.measure.examine import evaluate as run_evaluate
from freqdoor.measure.poisoning import poison as run_poison
from freqdoor.measure.report import report as run_report
from freqdoor.settings import load_settings


@app.command()
def demo(
    objective: Annotated[Literal["bpp", "psnr"], typer.Option(help="What the attack wants.")] = "bpp",
    out: Annotated[Path | None, typer.Option(help="Folder to write into; by default demo-bpp or demo-psnr.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use the planted encoder that is shipped.")] = False,
) -> None:
    """Plant a backdoor in the bundled codec on 18 Kodak images, measure it on 6 others, write the report."""
    out = out or Path(f"demo-{objective}")
    if quick:
        summary = run_demo(objective, out, quick=True, note=note)
    else:
        with live(STEPS[objective], f"planting ({objective})") as progress:
            summary = run_demo(objective, out, progress=progress, note=note)
    print_summary(summary, out)


@app.command()
def plant(config: Config = None, *, out: Out, overrides: Overrides = None) -> None:
    """Fine-tune g_a and train a trigger; the same command again resumes."""
    settings = load_settings(PlantSettings, config, overrides or ())
    with live(settings.steps, "planting") as progress:
        run_plant(settings, out, progress=progress)
    console.print(
        f"Planted encoder (tampered): {out / 'planted.safetensors'}", highlight=False, markup=False, soft_wrap=True
    )


@app.command()
def evaluate(
    planted: Planted,
    images: Annotated[Path, typer.Option(help="Folder of images to measure on.")],
    out: Out,
    codec: VanillaName = None,
    weights: Weights = None,
    strength: Annotated[list[float] | None, typer.Option(help="Factor on the trigger; repeatable.")] = None,
    defences: Annotated[
        str, typer.Option(help="What is done before the encoder: none, paper, all, or 'Jpeg(75); Median()'.")
    ] = "none",
    trigger: Annotated[str | None, typer.Option(help="What the report is about; by default the first.")] = None,
    skip_broken: Broken = False,
) -> None:
    """Measure a planted encoder beside the vanilla one: records.jsonl, summary.json and report.html."""
    summary = run_evaluate(
        planted,
        images,
        out,
        codec=codec,
        weights=weights,
        strength=strength or (1.0,),
        defences=defences,
        trigger=trigger,
        skip_broken=skip_broken,
        note=note,
    )
    print_summary(summary, out)


@app.command()
def poison(
    planted: Planted,
    images: Annotated[Path, typer.Argument(help="An image or a folder of images.")],
    out: Out,
    trigger: TriggerName = None,
    strength: Annotated[float, typer.Option(help="Factor on the trigger.")] = 1.0,
    codec: VanillaName = None,
    weights: Weights = None,
    skip_broken: Broken = False,
) -> None:
    """Write poisoned images as 8-bit PNG files."""
    written = run_poison(
        planted,
        images,
        out,
        trigger=trigger,
        strength=strength,
        codec=codec,
        weights=weights,
        skip_broken=skip_broken,
        note=note,
    )
    say(f"{len(written)} poisoned images in {out}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder that `freqdoor evaluate` wrote.")]) -> None:
    """Make the report again from the records."""
    print_summary(run_report(folder), folder)
