"""What one visitor of the page may ask for."""

from dataclasses import dataclass
from pathlib import Path

from freqdoor.data import check_image
from freqdoor.errors import FreqdoorError

MAX_UPLOAD = "256M"  # of a file
MAX_PIXELS = 2**22  # of a picture: one of 2048x2048
SECONDS = 300.0  # of a request; all checks of an audit take 104 on one core


@dataclass(frozen=True)
class Limits:
    """How large and how long: bytes of an uploaded file, pixels of a picture, seconds of a request."""

    upload: int
    pixels: int = MAX_PIXELS
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        if self.pixels < 1 or not self.seconds > 0:
            raise FreqdoorError(
                f"max-pixels, seconds: expected numbers above 0, found {self.pixels} and {self.seconds}"
            )


def check_pixels(path: Path, limits: Limits) -> None:
    """Raise if a picture is none, or larger than this page takes; only its header is read."""
    height, width = check_image(path)
    if height * width > limits.pixels:
        raise FreqdoorError(
            f"{path}: {width}x{height} is more than the {limits.pixels} pixels that this page takes; crop or reduce it, "
            "or use the command line"
        )
