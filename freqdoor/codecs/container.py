"""The file format of one compressed image, `.fqd`: header, entropy coder's strings, checksum.

Little-endian: magic "FQDR", version (u16), the first 16 bytes of the codec's decoder hash, height and width (u32),
height and width of the coarsest latents (u32), number of strings (u16), for each string its length, how many symbols it
holds and their checksum (u32 each, `Bitstream.symbols`), the strings, and the CRC-32 of everything before it. Version 1
had the lengths alone, and is not read. Version 3 holds a WebP or PNG file instead of strings, without entries and with
zeros for the latents: what a guard sends of a picture that the codec does harm to. The decoder hash leaves out g_a and
h_a but has the coding tables: a file decodes with every codec that has the same decoder, which is what lets a tampered
encoder go unnoticed. How the strings and the finer latents nest in a codec like ELIC, and what the picture was padded
to, is not stored: it follows from the codec (`Codec.tile`, `sides`). A machine that decodes other symbols than were
encoded says so instead of showing a picture.
"""

import struct
import warnings
import zlib
from pathlib import Path

from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.coder import Symbols
from freqdoor.codecs.loading import load_codec
from freqdoor.codecs.protocol import SHORTEST
from freqdoor.data import MAX_PIXELS, load_image, picture_in, picture_kind, save_image
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, refuse_overwriting, refuse_picture_name, replacing
from freqdoor.limits import read_whole
from freqdoor.samples import BUNDLED
from freqdoor.types import Bitstream, Images, PictureFile

MAGIC = b"FQDR"
VERSION = 2
OF_A_PICTURE = 3  # the version that holds a classical codec's file
HEADER = struct.Struct("<4sH16sIIIIH")
ENTRY = struct.Struct("<III")  # of a string in the header
CHECKSUM = struct.Struct("<I")
LONGEST = 2**29  # bytes of a file: 128 bits a pixel of the largest picture


def pack(sent: Bitstream | PictureFile, codec: Codec) -> bytes:
    """The bytes of a file that holds the bitstream, or a classical codec's file."""
    decoder = bytes.fromhex(codec.decoder_hash)[:16]
    if isinstance(sent, PictureFile):
        body = HEADER.pack(MAGIC, OF_A_PICTURE, decoder, *sent.image_size, 0, 0, 0) + sent.content
        return body + CHECKSUM.pack(zlib.crc32(body))
    header = HEADER.pack(MAGIC, VERSION, decoder, *sent.image_size, *sent.latent_shape, len(sent.strings))
    if len(sent.symbols) != len(sent.strings):
        raise FreqdoorError("CompressAI's own coder keeps no checksums of what it codes, which a file needs; take ours")
    entries = [ENTRY.pack(len(s), *symbols) for s, symbols in zip(sent.strings, sent.symbols, strict=True)]
    body = b"".join((header, *entries, *sent.strings))
    return body + CHECKSUM.pack(zlib.crc32(body))


def unpack(content: bytes, codec: Codec) -> Bitstream | PictureFile:
    """What a file's bytes hold; raises on another format, version or codec, and on any damage."""
    if content[:4] != MAGIC:
        raise FreqdoorError("expected a file written by `freqdoor compress`, found another format")
    if len(content) < HEADER.size + CHECKSUM.size:
        raise FreqdoorError(f"truncated: {len(content)} bytes are less than a header")
    _, version, codec_hash, height, width, latent_height, latent_width, count = HEADER.unpack_from(content)
    if version not in (VERSION, OF_A_PICTURE):
        older = "; files of version 1 have no checksums of their latents: compress the picture again"
        raise FreqdoorError(
            f"format version {version}, this freqdoor reads versions {VERSION} and {OF_A_PICTURE}"
            f"{older if version < VERSION else ''}"
        )
    body = content[: -CHECKSUM.size]
    if zlib.crc32(body) != CHECKSUM.unpack(content[-CHECKSUM.size :])[0]:
        raise FreqdoorError("damaged or truncated: the checksum does not match")
    if codec_hash != bytes.fromhex(codec.decoder_hash)[:16]:
        raise FreqdoorError(
            f"was compressed for another decoder than {codec.spec.name}; pass the codec that wrote it with --codec"
        )
    if version == OF_A_PICTURE:
        if not 0 < height * width <= MAX_PIXELS or (latent_height, latent_width, count) != (0, 0, 0):
            raise FreqdoorError("damaged: the sizes in the header do not belong together")
        return PictureFile(body[HEADER.size :], (height, width))
    if (
        not 0 < height * width <= MAX_PIXELS
        or (latent_height, latent_width) != codec.latent_shape((height, width))
        or count != codec.tile.strings
    ):
        raise FreqdoorError(
            f"damaged, or written with pictures padded to another multiple than {codec.multiple} pixels: the sizes in "
            "the header do not belong together"
        )
    start = HEADER.size + count * ENTRY.size
    if start > len(body):
        raise FreqdoorError("damaged: the sizes in the header do not add up")
    entries = list(ENTRY.iter_unpack(body[HEADER.size : start]))
    lengths = [entry[0] for entry in entries]
    symbols = tuple(Symbols(*entry[1:]) for entry in entries)
    short = any(n < SHORTEST and not may_be for n, may_be in zip(lengths, codec.tile.short, strict=True))
    if start + sum(lengths) != len(body) or short:
        raise FreqdoorError("damaged: the sizes in the header do not add up")
    strings = []
    for length in lengths:
        strings.append(body[start : start + length])
        start += length
    return Bitstream(tuple(strings), (latent_height, latent_width), (height, width), symbols)


def compress(
    image: Path | str,
    out: Path | str,
    codec: Codec | str = BUNDLED,
    weights: Path | str | None = None,
    *,
    force: bool = False,
) -> Bitstream:
    """Compress one image file into the file `out`.

    Args:
        codec, weights: as for `load_codec`, or a loaded codec.
        force: overwrite a file that is there and that is no compressed image.

    Raises:
        FreqdoorError: an unreadable image, a codec that is none, a file in the way, or a place that cannot be written
            to.
    """
    codec, x = prepared(image, out, codec, weights, force=force)
    bitstream = codec.compress(x)[0]
    write_file(codec, bitstream, Path(out))
    return bitstream


def prepared(
    image: Path | str, out: Path | str, codec: Codec | str, weights: Path | str | None, *, force: bool
) -> tuple[Codec, Images]:
    """The codec and the image, (1, 3, h, w), of what `compress` is asked for; raises as it does before the work."""
    refuse_overwriting(Path(image), Path(out))
    refuse_picture_name(Path(out))
    check_outputs([out], "compress", force=force)
    return _opened(codec, weights), load_image(Path(image))


def write_file(codec: Codec, sent: Bitstream | PictureFile, out: Path) -> None:
    """Write one bitstream, or a classical codec's file, as a file."""
    with replacing(out) as partial:
        partial.write_bytes(pack(sent, codec))


def decoded(sent: Bitstream | PictureFile, codec: Codec) -> Images:
    """The image, (1, 3, h, w), that a receiver sees; FreqdoorError if it is damaged or another codec's."""
    return codec.decompress(sent) if isinstance(sent, Bitstream) else picture_in(sent.content, sent.image_size)


def decompress(
    file: Path | str,
    out: Path | str,
    codec: Codec | str = BUNDLED,
    weights: Path | str | None = None,
    *,
    force: bool = False,
) -> None:
    """Decode a file that `compress` wrote into an 8-bit image file; the decoder does not depend on who encoded it.

    Args:
        codec, weights: as for `load_codec`, or a loaded codec.
        force: overwrite a file that is there and that `decompress` did not make.

    Raises:
        FreqdoorError: a file of another format, version or codec, a damaged one, a file in the way, or a place that
            cannot be written to.
    """
    picture_kind(out)
    refuse_overwriting(Path(file), Path(out))
    check_outputs([out], "decompress", force=force)
    content = read_whole(file, "a file that `freqdoor compress` wrote", LONGEST)
    codec = _opened(codec, weights)
    try:
        x_hat = decoded(unpack(content, codec), codec)
    except FreqdoorError as error:
        raise FreqdoorError(f"{file}: {error}") from None
    save_image(Path(out), x_hat, "decompress")


def _opened(codec: Codec | str, weights: Path | str | None) -> Codec:
    if isinstance(codec, Codec):
        return codec
    loaded = load_codec(codec, weights)
    if loaded.tampered:
        warnings.warn(f"{codec} says of itself that its encoder was tampered with", stacklevel=3)
    return loaded
