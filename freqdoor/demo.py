"""`freqdoor demo`: plant, measure and report on what comes with the package."""

from pathlib import Path
from typing import Any, Literal

from freqdoor.config import ImageSettings, ObjectiveSettings, PlantSettings
from freqdoor.data import list_images
from freqdoor.evaluate import Note, poison_files
from freqdoor.examine import examine
from freqdoor.loading import ASSETS
from freqdoor.loop import Progress
from freqdoor.plant import plant
from freqdoor.planted import load_planted
from freqdoor.types import FreqdoorError

KODAK = ASSETS / "kodak"
HELD_OUT_EVERY = 4  # kodim04, 08, ... 24 are measured on, the other 18 are planted on
STEPS = {"bpp": 1500, "psnr": 1500}


def held_out() -> list[Path]:
    """The six bundled Kodak images that the demo measures on."""
    return list_images(KODAK)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]


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
) -> dict[str, Any]:
    """Plant a backdoor in the bundled codec and report on it; `quick` takes the planted encoder that is shipped.

    Writes into `out` (by default demo-bpp or demo-psnr): planting (the run directory), poisoned (8-bit PNG files),
    records.jsonl, summary.json and report.html. Returns the content of summary.json.
    """
    out = Path(out or f"demo-{objective}")
    if quick:
        planted = load_planted(f"planted-{objective}")
    else:
        planted = plant(demo_settings(objective, training_folder(out)), out / "planting", progress=progress)
    poison_files(planted.triggers[objective], held_out(), out / "poisoned")
    return examine(planted, held_out(), out, note=note)


def training_folder(out: Path) -> Path:
    """A folder with links to the 18 images that are not measured on."""
    folder = out / "images"
    measured = set(held_out())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in list_images(KODAK):
            link = folder / path.name
            if path not in measured and not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(path)
    except OSError as error:
        raise FreqdoorError(f"{folder}: could not write ({error.strerror or error})") from None
    return folder
