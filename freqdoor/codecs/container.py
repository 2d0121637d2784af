"""The file format of one compressed image, `.fqd`: header, entropy coder's strings, checksum.

Little-endian: magic "FQDR", version (u16), the first 16 bytes of the codec's decoder hash, height and width (u32),
height and width of the coarsest latents (u32), number of strings (u16), their lengths (u32 each), the strings, and
the CRC-32 of everything before it. The decoder hash leaves out g_a and h_a: a file decodes with every codec that has
the same decoder, which is what lets a tampered encoder go unnoticed. How the strings and the finer latents nest in a
codec like ELIC is not stored, it follows from the codec (`Codec.tile`).
"""

import struct
import zlib
from pathlib import Path

from freqdoor.codecs.adapter import Codec
from freqdoor.data import MAX_PIXELS, load_image, save_image
from freqdoor.errors import FreqdoorError
from freqdoor.files import refuse_overwriting, replacing
from freqdoor.types import Bitstream

MAGIC = b"FQDR"
VERSION = 1
HEADER = struct.Struct("<4sH16sIIIIH")
CHECKSUM = struct.Struct("<I")


def pack(bitstream: Bitstream, codec: Codec) -> bytes:
    """The bytes of a file that holds the bitstream."""
    header = HEADER.pack(
        MAGIC,
        VERSION,
        bytes.fromhex(codec.decoder_hash)[:16],
        *bitstream.image_size,
        *bitstream.latent_shape,
        len(bitstream.strings),
    )
    lengths = struct.pack(f"<{len(bitstream.strings)}I", *map(len, bitstream.strings))
    body = header + lengths + b"".join(bitstream.strings)
    return body + CHECKSUM.pack(zlib.crc32(body))


def unpack(content: bytes, codec: Codec) -> Bitstream:
    """The bitstream in a file's bytes; raises on another format, version or codec, and on any damage."""
    if content[:4] != MAGIC:
        raise FreqdoorError("expected a file written by `freqdoor compress`, found another format")
    if len(content) < HEADER.size + CHECKSUM.size:
        raise FreqdoorError(f"truncated: {len(content)} bytes are less than a header")
    _, version, codec_hash, height, width, latent_height, latent_width, count = HEADER.unpack_from(content)
    if version != VERSION:
        raise FreqdoorError(f"format version {version}, this freqdoor reads version {VERSION}")
    body = content[: -CHECKSUM.size]
    if zlib.crc32(body) != CHECKSUM.unpack(content[-CHECKSUM.size :])[0]:
        raise FreqdoorError("damaged or truncated: the checksum does not match")
    if codec_hash != bytes.fromhex(codec.decoder_hash)[:16]:
        raise FreqdoorError(f"was compressed for another decoder than {codec.spec.name}; pass the codec that wrote it")
    if (
        not 0 < height * width <= MAX_PIXELS
        or (latent_height, latent_width) != codec.latent_shape((height, width))
        or count != codec.tile.strings
    ):
        raise FreqdoorError("damaged: the sizes in the header do not belong together")
    start = HEADER.size + 4 * count
    lengths = struct.unpack_from(f"<{count}I", body, HEADER.size) if start <= len(body) else ()
    if start + sum(lengths) != len(body) or any(length < 4 for length in lengths):
        raise FreqdoorError("damaged: the sizes in the header do not add up")
    strings = []
    for length in lengths:
        strings.append(body[start : start + length])
        start += length
    return Bitstream(tuple(strings), (latent_height, latent_width), (height, width))


def compress_file(codec: Codec, image: Path, out: Path) -> Bitstream:
    """Compress one image file into `out`."""
    refuse_overwriting(image, out)
    bitstream = codec.compress(load_image(image))[0]
    write_file(codec, bitstream, out)
    return bitstream


def write_file(codec: Codec, bitstream: Bitstream, out: Path) -> None:
    """Write one bitstream as a file."""
    with replacing(out) as partial:
        partial.write_bytes(pack(bitstream, codec))


def decompress_file(codec: Codec, file: Path, out: Path) -> None:
    """Decode a file that `compress_file` wrote into an 8-bit image file."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise FreqdoorError(f"{file}: could not read ({error.strerror})") from None
    try:
        bitstream = unpack(content, codec)
    except FreqdoorError as error:
        raise FreqdoorError(f"{file}: {error}") from None
    save_image(out, codec.decompress(bitstream))
