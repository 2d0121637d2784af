"""The verb of ownership: verify-owner."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import freqdoor
from freqdoor.cli.options import NOTHING_KEPT, TriggerName, VanillaName, Weights, load_torch, verb
from freqdoor.cli.terminal import note, say, say_table
from freqdoor.samples import KODAK


@verb("verify-owner", kept=NOTHING_KEPT)
def verify_owner(
    key: Annotated[Path, typer.Argument(help="The owner's planted.safetensors, whose trigger is the secret.")],
    suspects: Annotated[list[str], typer.Argument(help="Codecs to ask: files or names, or NAME=WEIGHTS.")],
    images: Annotated[Path, typer.Option(help="Ten images or more; by default the bundled ones.")] = KODAK,
    trigger: TriggerName = None,
    codec: VanillaName = None,
    weights: Weights = None,
    seed: Annotated[int, typer.Option(help="Seed of the controls.")] = 0,
    committed: Annotated[
        str | None,
        typer.Option(help="SHA-256 that was deposited of key and encoder, or of the key alone; others are refused."),
    ] = None,
    others: Annotated[bool, typer.Option("--others", help="All are known to be others': print how many pass.")] = False,
) -> object:
    """Ask encoders whether they are the owner's: by the bits that the secret trigger costs, and by their weights."""
    load_torch()
    answers = freqdoor.verify_owner(
        key, suspects, images, trigger=trigger, codec=codec, weights=weights, seed=seed, committed=committed, note=note
    )
    table = Table("codec", "trigger / clean", "control / clean", "images that answer", "p", "likeness", "the owner's")
    for suspect, answer in zip(suspects, answers, strict=True):
        ratios = (f"{answer.trigger_ratio:.2f}", f"{answer.control_ratio:.2f}")
        count = f"{answer.answering} of {answer.images}"
        likeness = "" if answer.likeness is None else f"{answer.likeness:.2f}"
        verdict = f"by {' and '.join(answer.evidence)}" if answer.owner else "no"
        table.add_row(suspect, *ratios, count, f"{answer.p_value:.2g}", likeness, verdict)
    say_table(table)
    say(f"Key and encoder, to be deposited: {answers[0].deposit}")
    say(f"Key alone: {answers[0].key}")
    passed = None
    if others:
        passing, count_all, upper = freqdoor.false_positives(answers)
        passed = freqdoor.FalsePositives(passing=passing, encoders=count_all, upper=upper)
        say(f"{passing} of {count_all} other encoders pass: at most {100 * upper:.0f} % (exact 95 % interval)")
    return freqdoor.Ownership(answers=dict(zip(suspects, answers, strict=True)), false_positives=passed)
