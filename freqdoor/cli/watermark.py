"""The verb of ownership: verify-owner."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from freqdoor.cli.options import TriggerName, VanillaName, Weights, app, console, note, say
from freqdoor.measure.watermark import false_positives
from freqdoor.measure.watermark import verify_owner as run_verify
from freqdoor.samples import KODAK


@app.command("verify-owner")
def verify_owner(
    key: Annotated[Path, typer.Argument(help="The owner's planted.safetensors, whose trigger is the secret.")],
    suspects: Annotated[list[str], typer.Argument(help="Codecs to ask: files or names, or NAME=WEIGHTS.")],
    images: Annotated[Path, typer.Option(help="Ten images or more; by default the bundled ones.")] = KODAK,
    trigger: TriggerName = None,
    others: Annotated[bool, typer.Option("--others", help="All are known to be others': print how many pass.")] = False,
    codec: VanillaName = None,
    weights: Weights = None,
) -> None:
    """Ask encoders whether they are the owner's: only that one spends bits on the owner's secret trigger."""
    answers = run_verify(key, suspects, images, trigger=trigger, codec=codec, weights=weights, note=note)
    table = Table("codec", "trigger / clean", "control / clean", "images that answer", "p", "the owner's")
    for suspect, answer in zip(suspects, answers, strict=True):
        ratios = (f"{answer.trigger_ratio:.2f}", f"{answer.control_ratio:.2f}")
        count = f"{answer.answering} of {answer.images}"
        table.add_row(suspect, *ratios, count, f"{answer.p_value:.2g}", "yes" if answer.owner else "no")
    console.print(table)
    if others:
        passed, count_all, upper = false_positives(answers)
        say(f"{passed} of {count_all} other encoders pass: at most {100 * upper:.0f} % (exact 95 % interval)")
