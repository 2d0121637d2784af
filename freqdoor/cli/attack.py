"""The verbs of an attack: demo, plant, evaluate, poison, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

import freqdoor
from freqdoor.cli.options import (
    MEASURED_KEPT,
    STEPS_KEPT,
    Broken,
    Config,
    Defences,
    Devices,
    Force,
    Nodes,
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
from freqdoor.cli.terminal import live, note, say, say_table
from freqdoor.settings import load_settings

if TYPE_CHECKING:
    from freqdoor.measure.report import Summary


@verb(kept=STEPS_KEPT)
def demo(
    objective: Annotated[Literal["bpp", "psnr"], typer.Option(help="What the attack wants.")] = "bpp",
    out: Annotated[Path | None, typer.Option(help="Folder to write into; by default demo-bpp or demo-psnr.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use the planted encoder that is shipped.")] = False,
    force: Force = False,
) -> object:
    """Plant a backdoor in the bundled codec on 18 Kodak images, measure it on 6 others, write the report."""
    load_torch()
    out = out or Path(f"demo-{objective}")
    with live(0 if quick else freqdoor.DEMO_STEPS, f"planting ({objective})") as progress:
        summary = freqdoor.demo(objective, out, quick=quick, force=force, progress=progress, note=note)
    print_summary(summary, out)
    return summary


@verb(kept=STEPS_KEPT)
def plant(
    config: Config = None, *, out: Out, devices: Devices = 1, nodes: Nodes = 1, overrides: Overrides = None
) -> object:
    """Fine-tune g_a and train a trigger; the same command again resumes."""
    settings = load_settings(freqdoor.PlantSettings, config, overrides or (), out=out)
    load_torch()
    with live(settings.steps, "planting") as progress:
        freqdoor.plant(settings, out, devices=devices, nodes=nodes, progress=progress)
    file = out / "planted.safetensors"
    say(f"Planted encoder (tampered): {file if file.exists() else 'on the first machine'}")
    return freqdoor.Written.of([file])


@verb(kept=MEASURED_KEPT)
def evaluate(
    planted: Planted,
    images: Annotated[Path, typer.Option(help="Folder of images to measure on.")],
    out: Out,
    codec: VanillaName = None,
    weights: Weights = None,
    strength: Annotated[list[float] | None, typer.Option(help="Factor on the trigger; repeatable.")] = None,
    defences: Defences = "none",
    trigger: Annotated[str | None, typer.Option(help="What the report is about; by default the first.")] = None,
    perceptual: Annotated[
        str | None, typer.Option(help="Measure LPIPS too: lpips, or lpips=FILE with torchvision's weights of AlexNet.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Images measured side by side, one thread each.")] = 1,
    runner: RunnerName = "local",
    skip_broken: Broken = False,
    force: Force = False,
) -> object:
    """Measure a planted encoder beside the vanilla one: records.jsonl, summary.json and report.html."""
    load_torch()
    summary = freqdoor.evaluate(
        planted,
        images,
        out,
        codec=codec,
        weights=weights,
        strength=strength or (1.0,),
        defences=defences,
        trigger=trigger,
        perceptual=perceptual,
        jobs=jobs,
        runner=runner,
        skip_broken=skip_broken,
        force=force,
        note=note,
    )
    print_summary(summary, out)
    return summary


@verb()
def poison(
    planted: Planted,
    images: Annotated[Path, typer.Argument(help="An image or a folder of images.")],
    out: Out,
    trigger: TriggerName = None,
    strength: Annotated[float, typer.Option(help="Factor on the trigger.")] = 1.0,
    codec: VanillaName = None,
    weights: Weights = None,
    skip_broken: Broken = False,
    force: Force = False,
) -> object:
    """Write poisoned images as 8-bit PNG files."""
    load_torch()
    written = freqdoor.poison(
        planted,
        images,
        out,
        trigger=trigger,
        strength=strength,
        codec=codec,
        weights=weights,
        skip_broken=skip_broken,
        force=force,
        note=note,
    )
    say(f"{len(written)} poisoned images in {out}")
    return freqdoor.Written.of(written)


@verb()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `freqdoor evaluate` wrote.")], force: Force = False
) -> object:
    """Make the report again from the records."""
    summary = freqdoor.report(folder, force=force)
    print_summary(summary, folder)
    return summary


def print_summary(summary: "Summary", out: Path) -> None:
    """Print what `evaluate` measured: table, verdict, and where the report is."""
    looked = ["LPIPS"] if summary.vanilla.lpips is not None else []
    table = Table("encoder and input", "PSNR dB", "MS-SSIM", *looked, "bpp real", "bpp estimated")
    rows = {
        "vanilla, clean": summary.vanilla,
        "tampered, clean": summary.clean,
        "tampered, poisoned (float)": summary.poisoned,
        "tampered, poisoned (8-bit)": summary.poisoned_8bit,
    }
    for name, row in rows.items():
        similarity = "-" if row.ms_ssim is None else f"{row.ms_ssim:.4f}"
        looks = [f"{row.lpips:.4f}"] if looked else []
        table.add_row(name, f"{row.psnr_db:.2f}", similarity, *looks, f"{row.bpp_real:.4f}", f"{row.bpp_estimated:.4f}")
    say_table(table)
    say(freqdoor.verdict(summary))
    say(f"Report: {out / 'report.html'}")
