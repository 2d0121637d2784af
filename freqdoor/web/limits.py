"""What one visitor of the page may ask for, and the other defaults of `freqdoor serve`."""

from dataclasses import dataclass

from freqdoor.errors import FreqdoorError

OUT = "freqdoor-web"
PORT = 7860  # Gradio's
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
                f"max_pixels, seconds: expected numbers above 0, found {self.pixels} and {self.seconds}"
            )
