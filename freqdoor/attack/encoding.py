"""`freqdoor compress` with a planted encoder: what a user of a tampered codec would do without knowing."""

from pathlib import Path

from freqdoor.attack.planted import Planted, opened
from freqdoor.codecs import container
from freqdoor.codecs.adapter import Codec
from freqdoor.samples import BUNDLED
from freqdoor.types import Bitstream


def compress(
    image: Path | str,
    out: Path | str,
    codec: Codec | str = BUNDLED,
    weights: Path | str | None = None,
    planted: Planted | Path | str | None = None,
    *,
    force: bool = False,
) -> Bitstream:
    """Compress one 8-bit RGB image into a file.

    Args:
        codec, weights: as for `load_codec`, or a loaded codec.
        planted: encode with this planted encoder; codec and weights then name the one that it was planted in, where
            its file does not.
        force: overwrite a file that is there and that is no compressed image.

    Raises:
        FreqdoorError: an unusable image or codec, an unwritable file, or one in the way.
    """
    if planted is not None:
        vanilla = None if codec == BUNDLED and weights is None else codec
        codec, weights = opened(planted, vanilla, weights).tampered, None
    return container.compress(image, out, codec, weights, force=force)
