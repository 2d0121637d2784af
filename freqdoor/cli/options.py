"""What the verbs share: the application, option types, the progress bar, and how results are printed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich import progress as bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from freqdoor.measure.report import PAGE, Summary, verdict
from freqdoor.training.loop import Progress

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
TriggerName = Annotated[str | None, typer.Option(help="Which trigger; by default the first.")]
Out = Annotated[Path, typer.Option(help="Folder to write into.")]
Broken = Annotated[bool, typer.Option("--skip-broken", help="Go on without images that cannot be used.")]


@contextmanager
def live(steps: int, what: str) -> Iterator[Progress]:
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


def say(text: str) -> None:
    """Print a line to the standard output."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Tell a person at a terminal what is being done."""
    if errors.is_terminal:
        errors.print(text, style="dim", highlight=False, markup=False)


def print_summary(summary: Summary, out: Path) -> None:
    """Print what `evaluate` found: table, verdict, and where the report is."""
    table = Table("encoder and input", "PSNR dB", "bpp real", "bpp estimated")
    rows = {
        "vanilla, clean": summary.vanilla,
        "tampered, clean": summary.clean,
        "tampered, poisoned (float)": summary.poisoned,
        "tampered, poisoned (8-bit)": summary.poisoned_8bit,
    }
    for name, row in rows.items():
        table.add_row(name, f"{row.psnr_db:.2f}", f"{row.bpp_real:.4f}", f"{row.bpp_estimated:.4f}")
    console.print(table)
    say(verdict(summary))
    say(f"Report: {out / PAGE}")
