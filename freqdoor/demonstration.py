"""`freqdoor demo`: plant, measure and report on what comes with the package."""

from pathlib import Path
from typing import Literal

from freqdoor.attack.plant import plant
from freqdoor.attack.planted import load_planted
from freqdoor.attack.settings import ObjectiveSettings, PlantSettings
from freqdoor.files import check_outputs
from freqdoor.measure.examine import evaluate
from freqdoor.measure.poisoning import poison
from freqdoor.measure.report import FILES, Summary
from freqdoor.notes import Note
from freqdoor.samples import held_out, training_folder
from freqdoor.training.loop import Progress
from freqdoor.training.settings import ImageSettings

DEMO_STEPS = 350
"""Steps of the demo's planting, at which both attacks are strong; what more bring is in docs/use.md."""


def demo_settings(objective: Literal["bpp", "psnr"], folder: Path) -> PlantSettings:
    """What the demo plants with; `folder` holds the 18 images."""
    return PlantSettings(
        images=ImageSettings(folder=str(folder), crop=128, batch_size=8),
        objective=ObjectiveSettings(name=objective),
        steps=DEMO_STEPS,
    )


def demo(
    objective: Literal["bpp", "psnr"] = "bpp",
    out: Path | str | None = None,
    *,
    quick: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Summary:
    """Plant a backdoor in the bundled codec and report on it; `quick` takes the planted encoder that is shipped.

    Writes into `out` (by default demo-bpp or demo-psnr): planting (the run directory), poisoned (8-bit PNG files),
    records.jsonl, summary.json and report.html.

    Args:
        force: overwrite files of these names that freqdoor did not make.
    """
    out = Path(out or f"demo-{objective}")
    check_outputs([out / "poisoned" / f"{path.stem}.png" for path in held_out()], "poison", force=force)
    check_outputs([out / file for file in FILES], "evaluate", force=force)
    if quick:
        planted = load_planted(f"planted-{objective}")
    else:
        planted = plant(demo_settings(objective, training_folder(out)), out / "planting", progress=progress)
    poison(planted, held_out(), out / "poisoned", trigger=objective, force=force)
    return evaluate(planted, held_out(), out, force=force, note=note)
