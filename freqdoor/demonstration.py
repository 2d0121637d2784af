"""`freqdoor demo`: plant, measure and report on what comes with the package."""

from pathlib import Path
from typing import Literal

from freqdoor.attack.plant import plant
from freqdoor.attack.planted import load_planted
from freqdoor.attack.settings import ObjectiveSettings, PlantSettings
from freqdoor.measure.examine import evaluate
from freqdoor.measure.poisoning import poison
from freqdoor.measure.records import Note
from freqdoor.measure.report import Summary
from freqdoor.samples import held_out, training_folder
from freqdoor.training.loop import Progress
from freqdoor.training.settings import ImageSettings

STEPS = {"bpp": 1500, "psnr": 1500}


def demo_settings(objective: Literal["bpp", "psnr"], folder: Path) -> PlantSettings:
    """What the demo plants with; `folder` holds the 18 images."""
    return PlantSettings(
        images=ImageSettings(folder=str(folder), crop=128, batch_size=8),
        objective=ObjectiveSettings(name=objective),
        steps=STEPS[objective],
    )


def demo(
    objective: Literal["bpp", "psnr"] = "bpp",
    out: Path | str | None = None,
    *,
    quick: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Summary:
    """Plant a backdoor in the bundled codec and report on it; `quick` takes the planted encoder that is shipped.

    Writes into `out` (by default demo-bpp or demo-psnr): planting (the run directory), poisoned (8-bit PNG files),
    records.jsonl, summary.json and report.html. Returns the content of summary.json.
    """
    out = Path(out or f"demo-{objective}")
    if quick:
        planted = load_planted(f"planted-{objective}")
    else:
        planted = plant(demo_settings(objective, training_folder(out)), out / "planting", progress=progress)
    poison(planted, held_out(), out / "poisoned", trigger=objective)
    return evaluate(planted, held_out(), out, note=note)
