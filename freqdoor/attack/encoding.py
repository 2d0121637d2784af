"""`freqdoor compress` and `decompress`: one picture into a file and back, with an authentic or a planted encoder."""

import warnings
from pathlib import Path

from freqdoor.attack.planted import Planted, opened
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.container import compress_file, decompress_file
from freqdoor.codecs.loading import load_codec
from freqdoor.samples import BUNDLED
from freqdoor.types import Bitstream


def compress(
    image: Path | str,
    out: Path | str,
    codec: Codec | str = BUNDLED,
    weights: Path | str | None = None,
    planted: Planted | Path | str | None = None,
) -> Bitstream:
    """Compress one 8-bit RGB image into a file.

    Args:
        codec, weights: as for `load_codec`.
        planted: encode with this planted encoder instead; codec and weights then name the one that it was planted in,
            where its file does not.

    Raises:
        FreqdoorError: an unusable image or codec, an unwritable file.
    """
    if planted is None:
        return compress_file(_loaded(codec, weights), Path(image), Path(out))
    vanilla = None if codec == BUNDLED and weights is None else codec
    return compress_file(opened(planted, vanilla, weights).tampered, Path(image), Path(out))


def decompress(
    file: Path | str, out: Path | str, codec: Codec | str = BUNDLED, weights: Path | str | None = None
) -> None:
    """Decode a file that `compress` wrote into an 8-bit image file; it does not matter who encoded it.

    Raises:
        FreqdoorError: a damaged file, one of another decoder, an unwritable image.
    """
    decompress_file(_loaded(codec, weights), Path(file), Path(out))


def _loaded(codec: Codec | str, weights: Path | str | None) -> Codec:
    """The codec; a warning if it calls itself tampered."""
    loaded = codec if isinstance(codec, Codec) else load_codec(codec, weights)
    if loaded.tampered:
        warnings.warn(f"{loaded.spec.name} says of itself that its encoder was tampered with", stacklevel=3)
    return loaded
