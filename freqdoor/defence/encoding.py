"""`freqdoor compress`: with a planted encoder, as a user of a tampered codec does without knowing; behind a guard."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, overload

from freqdoor.attack.planted import Planted, opened
from freqdoor.codecs import container
from freqdoor.codecs.adapter import Codec
from freqdoor.defence.outcome import Outcome
from freqdoor.errors import FreqdoorError
from freqdoor.samples import BUNDLED
from freqdoor.types import Bitstream, Result

if TYPE_CHECKING:
    from freqdoor.defence.expectation import GuardCalibration
    from freqdoor.defence.guard import Guarded


class Compressed(Result):
    """A file that holds one image: what `freqdoor compress` answers."""

    file: str
    bytes: int  # of the file
    payload_bytes: int  # what bpp counts: without header and checksum
    bpp: float
    width: int
    height: int
    guard: Outcome | None  # what a guard decided; None without one

    @classmethod
    def of(cls, result: "Bitstream | Guarded", file: Path) -> Self:
        """What `compress` has returned and written."""
        sent, outcome = (result, None) if isinstance(result, Bitstream) else (result.sent, result.outcome)
        height, width = sent.image_size
        return cls(
            file=str(file),
            bytes=file.stat().st_size,
            payload_bytes=sent.num_bytes,
            bpp=8 * sent.num_bytes / (height * width),
            width=width,
            height=height,
            guard=outcome,
        )


@overload
def compress(
    image: Path | str,
    out: Path | str,
    codec: Codec | str = ...,
    weights: Path | str | None = ...,
    planted: Planted | Path | str | None = ...,
    *,
    guard: Literal[False] = ...,
    calibration: "GuardCalibration | Path | str | None" = ...,
    force: bool = ...,
) -> Bitstream: ...


@overload
def compress(
    image: Path | str,
    out: Path | str,
    codec: Codec | str = ...,
    weights: Path | str | None = ...,
    planted: Planted | Path | str | None = ...,
    *,
    guard: bool,
    calibration: "GuardCalibration | Path | str | None" = ...,
    force: bool = ...,
) -> "Bitstream | Guarded": ...


def compress(
    image: Path | str,
    out: Path | str,
    codec: Codec | str = BUNDLED,
    weights: Path | str | None = None,
    planted: Planted | Path | str | None = None,
    *,
    guard: bool = False,
    calibration: "GuardCalibration | Path | str | None" = None,
    force: bool = False,
) -> "Bitstream | Guarded":
    """Compress one 8-bit RGB image into a file.

    Args:
        codec, weights: as for `load_codec`, or a loaded codec.
        planted: encode with this planted encoder; codec and weights then name the one that it was planted in, where
            its file does not.
        guard: send something else where the encoder does harm to the image; what was decided is returned.
        calibration: what the guard compares with, of `calibrate-guard`; by default what comes with the package.
        force: overwrite a file that is there and that is no compressed image.

    Raises:
        FreqdoorError: an unusable image or codec, an unwritable file, or one in the way; no calibration for this codec.
    """
    if planted is not None:
        vanilla = None if codec == BUNDLED and weights is None else codec
        codec, weights = opened(planted, vanilla, weights).tampered, None
    if not guard:
        if calibration is not None:
            raise FreqdoorError("compress: expected a calibration with the guard only, found one without; add --guard")
        return container.compress(image, out, codec, weights, force=force)
    from freqdoor.defence.guard import Guard  # loads what a plain compression does not need

    codec, x = container.prepared(image, out, codec, weights, force=force)
    guarded = Guard(codec, calibration).compress(x)
    container.write_file(codec, guarded.sent, Path(out))
    return guarded
