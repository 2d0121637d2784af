"""The command line: every verb is a typed function, and contains no knowledge of its own."""

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich import progress as bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from freqdoor import container
from freqdoor.codecs import Codec
from freqdoor.config import CodecSource, CodecTraining, PlantSettings, load_settings
from freqdoor.data import list_images, usable_images
from freqdoor.defences import parse_defences
from freqdoor.demo import STEPS, held_out
from freqdoor.demo import demo as run_demo
from freqdoor.evaluate import poison_files
from freqdoor.examine import examine
from freqdoor.loading import load_codec
from freqdoor.loop import Progress
from freqdoor.pgd import compare, comparison_table
from freqdoor.plant import plant as run_plant
from freqdoor.planted import load_planted
from freqdoor.recipes import RECIPES
from freqdoor.report import PAGE, verdict
from freqdoor.report import report as run_report
from freqdoor.reproduce import recipe_settings
from freqdoor.reproduce import reproduce as run_reproduce
from freqdoor.train import EXPORT
from freqdoor.train import train_codec as run_train
from freqdoor.types import BUNDLED, FreqdoorError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Plant and measure backdoors in learned image codecs.",
)
console = Console()
errors = Console(stderr=True)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, for example trigger.eps=0.003; repeatable.")
]
Config = Annotated[Path | None, typer.Argument(help="TOML file of settings; --set alone does as well.")]
CodecName = Annotated[str, typer.Option("--codec", help="name:quality, a checkpoint file, or package.module:factory.")]
Weights = Annotated[Path | None, typer.Option(help="Take the weights from this file; --codec gives the architecture.")]
VanillaName = Annotated[
    str | None, typer.Option("--codec", help="The vanilla codec; by default what the planted encoder's file names.")
]
Planted = Annotated[Path, typer.Argument(help="planted.safetensors, or the run directory that holds it.")]
Out = Annotated[Path, typer.Option(help="Folder to write into.")]
Broken = Annotated[bool, typer.Option("--skip-broken", help="Go on without images that cannot be used.")]


@contextmanager
def _live(steps: int, what: str) -> Iterator[Progress]:
    """A progress bar with the newest measured values."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with bars.Progress(*columns, console=errors) as bar:
        task = bar.add_task(what, total=steps, values="")

        def show(step: int, row: dict[str, float]) -> None:
            bar.update(task, completed=step, values=_values(row))
            if not errors.is_terminal and step % 100 == 0:
                errors.print(f"{what} {step}/{steps}  {_values(row)}", highlight=False)

        try:
            yield show
        except KeyboardInterrupt:
            errors.print("stopped; the same command goes on from the last checkpoint, if there is one yet")
            raise


def _values(row: dict[str, float]) -> str:
    if "bpp_poisoned" not in row:
        return f"loss {row['loss']:.3f}"
    return (
        f"clean {row['psnr_db_clean']:.2f} dB {row['bpp_clean']:.3f} bpp, "
        f"poisoned {row['psnr_db_poisoned']:.2f} dB {row['bpp_poisoned']:.3f} bpp, eps {row['eps']:.4f}"
    )


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _note(text: str) -> None:
    if errors.is_terminal:
        errors.print(text, style="dim", highlight=False, markup=False)


def _print_summary(summary: dict[str, object], out: Path) -> None:
    table = Table("encoder and input", "PSNR dB", "bpp real", "bpp estimated")
    names = {
        "vanilla": "vanilla, clean",
        "clean": "tampered, clean",
        "poisoned": "tampered, poisoned (float)",
        "poisoned_8bit": "tampered, poisoned (8-bit)",
    }
    for key, name in names.items():
        row = summary[key]
        assert isinstance(row, dict)
        table.add_row(name, *(f"{row[k]:.{d}f}" for k, d in (("psnr_db", 2), ("bpp_real", 4), ("bpp_estimated", 4))))
    console.print(table)
    _say(verdict(summary))
    _say(f"Report: {out / PAGE}")


def _load(codec: str, weights: Path | None, planted: Path | None) -> Codec:
    if planted is not None:
        return load_planted(planted, None if codec == BUNDLED and weights is None else codec, weights).tampered
    loaded = load_codec(codec, weights)
    if loaded.tampered:
        errors.print(f"note: {codec} says of itself that its encoder was tampered with", style="yellow", markup=False)
    return loaded


@app.command()
def demo(
    objective: Annotated[Literal["bpp", "psnr"], typer.Option(help="What the attack wants.")] = "bpp",
    out: Annotated[Path | None, typer.Option(help="Folder to write into; by default demo-bpp or demo-psnr.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use the planted encoder that is shipped.")] = False,
) -> None:
    """Plant a backdoor in the bundled codec on 18 Kodak images, measure it on 6 others, write the report."""
    out = out or Path(f"demo-{objective}")
    if quick:
        summary = run_demo(objective, out, quick=True, note=_note)
    else:
        with _live(STEPS[objective], f"planting ({objective})") as progress:
            summary = run_demo(objective, out, progress=progress, note=_note)
    _print_summary(summary, out)


@app.command("train-codec")
def train_codec(config: Config = None, *, out: Out, overrides: Overrides = None) -> None:
    """Train a vanilla codec on a folder of images; the same command again resumes."""
    settings = load_settings(CodecTraining, config, overrides or ())
    with _live(settings.steps, settings.codec) as progress:
        run_train(settings, out, progress=progress)
    _say(f"Codec: {out / EXPORT}")


@app.command()
def plant(config: Config = None, *, out: Out, overrides: Overrides = None) -> None:
    """Fine-tune g_a and train a trigger; the same command again resumes."""
    settings = load_settings(PlantSettings, config, overrides or ())
    with _live(settings.steps, "planting") as progress:
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
    loaded = load_planted(planted, codec, weights)
    summary = examine(
        loaded,
        list_images(images),
        out,
        trigger=trigger,
        strengths=strength or (1.0,),
        defences=parse_defences(defences),
        skip_broken=skip_broken,
        note=_note,
    )
    _print_summary(summary, out)


@app.command()
def poison(
    planted: Planted,
    images: Annotated[Path, typer.Argument(help="An image or a folder of images.")],
    out: Out,
    trigger: Annotated[str | None, typer.Option(help="Which trigger; by default the first.")] = None,
    strength: Annotated[float, typer.Option(help="Factor on the trigger.")] = 1.0,
    codec: VanillaName = None,
    weights: Weights = None,
    skip_broken: Broken = False,
) -> None:
    """Write poisoned images as 8-bit PNG files."""
    triggers = load_planted(planted, codec, weights).triggers
    name = trigger or next(iter(triggers))
    if name not in triggers:
        raise FreqdoorError(f"--trigger {name}: this encoder has {', '.join(triggers)}")
    paths = usable_images(list_images(images), decode=True, skip_broken=skip_broken)
    written = poison_files(triggers[name], paths, out, strength=strength, note=_note)
    _say(f"{len(written)} poisoned images in {out}")


@app.command()
def reproduce(
    recipe: Annotated[str, typer.Argument(help=f"One of {', '.join(RECIPES)}.")],
    config: Annotated[Path | None, typer.Argument(help="Settings as for plant; rows change theirs.")] = None,
    images: Annotated[Path | None, typer.Option(help="Measured on; by default six bundled Kodak images.")] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="Plant in this codec, or in NAME=WEIGHTS; repeatable for curves.")
    ] = None,
    out: Out = Path("results"),
    runs: Annotated[Path, typer.Option(help="Where plantings are kept; recipes share them.")] = Path("runs/reproduce"),
    seeds: Annotated[int, typer.Option(help="Plantings of every row.")] = 3,
    budget: Annotated[float | None, typer.Option(help="Start no planting after so many minutes; go on later.")] = None,
    overrides: Overrides = None,
) -> None:
    """Reproduce a table or figure: run or resume what is missing, the paper's column beside ours."""
    settings = recipe_settings(config, overrides or (), runs)
    measured = list_images(images) if images else held_out()
    named = [text.partition("=") for text in codec or ()]
    codecs = [CodecSource(name=name, weights=file or None) for name, _, file in named]
    with ExitStack() as shown:

        def announce(what: str, steps: int) -> Progress:
            shown.close()
            return shown.enter_context(_live(steps, what))

        table = run_reproduce(
            recipe, settings, measured, out, codecs=codecs, runs=runs, seeds=seeds, minutes=budget, announce=announce
        )
    page = out / f"{recipe}.md"
    missing = [row for row, cells in table.items() if not cells]
    _say(page.read_text(encoding="utf-8"))
    if missing:
        _say(f"Not planted yet: {', '.join(missing)}; the same command goes on.")
    _say(f"Table: {page}")


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
        _note(f"{row.record.image}: {row.attack}")
    _say(comparison_table(rows))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder that `freqdoor evaluate` wrote.")]) -> None:
    """Make the report again from the records."""
    _print_summary(run_report(folder), folder)


@app.command()
def compress(
    image: Annotated[Path, typer.Argument(help="8-bit RGB image.")],
    out: Annotated[Path, typer.Argument(help="File to write.")],
    codec: CodecName = BUNDLED,
    weights: Weights = None,
    planted: Annotated[Path | None, typer.Option(help="Encode with this planted encoder.")] = None,
) -> None:
    """Compress one image into a file."""
    bitstream = container.compress_file(_load(codec, weights, planted), image, out)
    height, width = bitstream.image_size
    rate = 8 * bitstream.num_bytes / (height * width)
    _say(f"{out}: {out.stat().st_size} bytes, {rate:.4f} bpp")


@app.command()
def decompress(
    file: Annotated[Path, typer.Argument(help="File that `freqdoor compress` wrote.")],
    out: Annotated[Path, typer.Argument(help="Image to write, best a .png.")],
    codec: CodecName = BUNDLED,
    weights: Weights = None,
) -> None:
    """Decode a compressed file; the decoder does not depend on who encoded it."""
    container.decompress_file(_load(codec, weights, None), file, out)


def main() -> None:
    """Run a command; every expected failure ends in one sentence and exit code 2."""
    torch.set_flush_denormal(True)  # denormal numbers slow late training down
    warnings.showwarning = _show_warning
    try:
        app()
    except FreqdoorError as error:
        _fail(str(error))
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else str(error)
        _fail(f"could not read or write: {reason}")
    except (MemoryError, torch.OutOfMemoryError):
        _fail("out of memory; use smaller images, crops or batches")
    except RuntimeError as error:  # torch has no type of its own for a CPU that is out of memory
        if "allocate memory" not in str(error):
            raise
        _fail("out of memory; use smaller images, crops or batches")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    errors.print(f"note: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _fail(message: str) -> None:
    errors.print(f"freqdoor: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(2)
