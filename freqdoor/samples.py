"""What comes with the package: planted encoders, a trained codec and Kodak's pictures, some of them held out."""

from pathlib import Path

from freqdoor.data import list_images
from freqdoor.types import FreqdoorError

ASSETS = Path(__file__).parent / "assets"
KODAK = ASSETS / "kodak"
HELD_OUT_EVERY = 4  # kodim04, 08, ... 24 are measured on, the other 18 are planted on


def held_out() -> list[Path]:
    """The six bundled Kodak images that the demo measures on."""
    return list_images(KODAK)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]


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
