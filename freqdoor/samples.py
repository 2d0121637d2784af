"""What comes with the package: planted encoders, a trained codec and Kodak's pictures, some of them held out."""

from pathlib import Path

from freqdoor.errors import FreqdoorError

ASSETS = Path(__file__).parent / "assets"
SHIPPED = ("planted-bpp", "planted-psnr", "planted-face")  # planted encoders by name
BUNDLED = "lite-hyperprior:3"  # the codec that comes with the package
KODAK = ASSETS / "kodak"
HELD_OUT_EVERY = 4  # kodim04, 08, ... 24 are measured on, the other 18 are planted on


def pictures() -> list[Path]:
    """The 24 bundled Kodak images, in order."""
    return sorted(KODAK.glob("*.png"))


def held_out() -> list[Path]:
    """The six bundled Kodak images that the demo measures on."""
    return pictures()[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]


def training_folder(out: Path) -> Path:
    """A folder with links to the 18 images that are not measured on."""
    folder = out / "images"
    measured = set(held_out())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in pictures():
            link = folder / path.name
            if path not in measured and not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(path)
    except OSError as error:
        raise FreqdoorError(f"{folder}: could not write ({error.strerror or error})") from None
    return folder
