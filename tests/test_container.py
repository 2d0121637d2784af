import hashlib
import struct
import zlib
from dataclasses import replace

import pytest
from conftest import check_foreign, natural, write_png
from factories import tiny

from freqdoor import compress, decompress, load_codec, load_image, save_codec
from freqdoor.codecs.architectures import ARCHITECTURES
from freqdoor.codecs.container import pack, unpack
from freqdoor.errors import FreqdoorError
from freqdoor.samples import BUNDLED
from freqdoor.types import to_uint8


@pytest.fixture
def content(codec):
    return pack(codec.compress(natural(1, 70, 90))[0], codec)


def test_file_round_trip(tmp_path, codec):
    source = write_png(tmp_path / "x.png", natural(1, 70, 90))
    bitstream = compress(source, tmp_path / "x.fqd", codec)
    assert unpack((tmp_path / "x.fqd").read_bytes(), codec) == bitstream
    decompress(tmp_path / "x.fqd", tmp_path / "back.png", codec)
    expected = to_uint8(codec.decompress(bitstream))
    assert (to_uint8(load_image(tmp_path / "back.png")) == expected).all()
    assert (tmp_path / "x.fqd").stat().st_size - bitstream.num_bytes < 70


def test_other_files_are_refused_before_the_work(tmp_path, codec, monkeypatch):
    source, out = write_png(tmp_path / "x.png", natural(1, 64, 64)), tmp_path / "out"
    write = lambda **options: compress(source, out / "x.fqd", codec, **options)  # noqa: E731
    check_foreign(write, out, ["x.fqd"], monkeypatch, "freqdoor.codecs.adapter.Codec.compress")
    for _ in range(2):
        write()
    file = (out / "x.fqd").rename(tmp_path / "x.fqd")
    for name in ("x.png", "x.jpg", "x.tiff"):
        write = lambda name=name, **options: decompress(file, out / name, codec, **options)  # noqa: E731
        check_foreign(write, out, [name], monkeypatch, "freqdoor.codecs.adapter.Codec.decompress")
        for _ in range(2):
            write()
        (out / name).unlink()
    decompress(file, out / "x.bmp", codec)
    with pytest.raises(FreqdoorError, match=r"x\.bmp: this file is there and `freqdoor decompress` did not make it"):
        decompress(file, out / "x.bmp", codec)  # a BMP cannot say who made it
    decompress(file, out / "x.bmp", codec, force=True)
    for name, reason in (("x.fqd", "expected an image's file name"), ("x.png", "there and `freqdoor decompress` did")):
        with pytest.raises(FreqdoorError, match=reason):
            decompress(file, tmp_path / name, codec)


@pytest.mark.parametrize("architecture", ["lite-hyperprior", "bmshj2018-factorized", "mbt2018"])
def test_files_are_what_they_were(architecture):
    """The format put together by hand; the decoder's hash is that of the direct submodules."""
    codec = tiny(architecture)
    bitstream = codec.compress(natural(1, 70, 90))[0]
    decoder = hashlib.sha256()
    for name, module in sorted(codec.net.named_children()):
        digest = hashlib.sha256()
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)};".encode() + tensor.numpy().tobytes())
        if name not in ("g_a", "h_a"):
            decoder.update(f"{name}={digest.hexdigest()};".encode())
    latents = (8, 8) if architecture == "bmshj2018-factorized" else (2, 2)
    body = struct.pack("<4sH16s4IH", b"FQDR", 2, decoder.digest()[:16], 70, 90, *latents, len(bitstream.strings))
    for i, string in enumerate(bitstream.strings):
        body += struct.pack("<I", len(string))
        body += struct.pack("<II", *bitstream.symbols[i])
    body += b"".join(bitstream.strings)
    content = body + struct.pack("<I", zlib.crc32(body))
    assert pack(bitstream, codec) == content
    assert unpack(content, codec) == bitstream


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (75, 200)])
def test_shapes_of_all_latents_follow_from_the_size(architecture, size):
    codec = tiny(architecture)
    bitstream = codec.compress(natural(6, *size))[0]
    assert bitstream.latent_shape == codec.latent_shape(size)
    assert len(bitstream.strings) == codec.tile.strings
    assert codec.decompress(bitstream).shape[2:] == size


def test_every_flipped_bit_and_every_truncation_is_noticed(content, codec):
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(FreqdoorError):
            unpack(bytes(damaged), codec)
    for length in range(0, len(content), 11):
        with pytest.raises(FreqdoorError):
            unpack(content[:length], codec)


def test_another_codec_is_named(content):
    with pytest.raises(FreqdoorError, match="another decoder than factories:hyperprior"):
        unpack(content, load_codec("factories:hyperprior"))


def test_another_encoder_with_the_same_decoder_is_accepted(content, codec):
    import torch

    with torch.no_grad():
        codec.net.g_a[0].weight.mul_(1.01)
    unpack(content, codec)


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_shape": (60000, 60000)},
        {"latent_shape": (0, 0)},
        {"image_size": (0, 0)},
        {"strings": (b"abcd",)},
        {"strings": (b"", b"")},
        {"image_size": (60000, 60000)},
    ],
)
@pytest.mark.parametrize("architecture", ["lite-hyperprior", "elic2022-official"])
def test_crafted_headers_with_a_valid_checksum(architecture, changes):
    codec = tiny(architecture)
    bitstream = replace(codec.compress(natural(1, 70, 90))[0], **changes)
    crafted = pack(replace(bitstream, symbols=bitstream.symbols[: len(bitstream.strings)]), codec)
    with pytest.raises(FreqdoorError, match="damaged"):
        unpack(crafted, codec)


def test_other_formats(codec):
    with pytest.raises(FreqdoorError, match="another format"):
        unpack(b"\x89PNG....", codec)


def test_a_file_shorter_than_header_and_checksum_is_said_to_be_short(content, codec):
    shortest = struct.calcsize("<4sH16s4IH") + struct.calcsize("<I")
    for length in (4, shortest - 1):
        with pytest.raises(FreqdoorError, match=f"truncated: {length} bytes are less than a header"):
            unpack(content[:length], codec)
    with pytest.raises(FreqdoorError, match="checksum"):
        unpack(content[:shortest], codec)


def test_one_pixel_is_an_image(codec):
    bitstream = codec.compress(natural(1, 1, 1))[0]
    assert unpack(pack(bitstream, codec), codec) == bitstream


def test_a_codec_that_calls_itself_tampered_is_announced(tmp_path, codec, recwarn):
    source = write_png(tmp_path / "x.png", natural(1, 64, 64))
    for tampered in (False, True):
        save_codec(load_codec(BUNDLED), tmp_path / "c.safetensors", tampered=tampered)
        compress(source, tmp_path / "x.fqd", str(tmp_path / "c.safetensors"))
        said = [str(warning.message) for warning in recwarn.list]
        assert [text.endswith("its encoder was tampered with") for text in said] == [True] * tampered


def test_a_whole_file_that_decodes_to_other_latents_is_no_picture(tmp_path, codec):
    """As after a change of processor: the strings are whole, their checksums are not those of what is decoded."""
    bitstream = codec.compress(natural(1, 70, 90))[0]
    symbols = tuple(entry._replace(crc=entry.crc ^ 1) for entry in bitstream.symbols)
    (tmp_path / "x.fqd").write_bytes(pack(replace(bitstream, symbols=symbols), codec))
    expected = "x.fqd: factories:lite: the decoded latents or the picture's size are not those that were encoded"
    with pytest.raises(FreqdoorError, match=expected):
        decompress(tmp_path / "x.fqd", tmp_path / "back.png", codec)
    assert not (tmp_path / "back.png").exists()


def test_a_picture_cropped_to_another_size_is_no_picture(codec):
    bitstream = codec.compress(natural(1, 70, 90))[0]
    for size in ((71, 90), (70, 89), (90, 70)):
        crafted = unpack(pack(replace(bitstream, image_size=size), codec), codec)
        with pytest.raises(FreqdoorError, match="the picture's size are not those that were encoded"):
            codec.decompress(crafted)


@pytest.mark.parametrize(("version", "words"), [(1, "compress the picture again"), (4, "reads versions 2 and 3$")])
def test_other_versions_are_named(content, codec, version, words):
    body = content[:4] + struct.pack("<H", version) + content[6:-4]
    with pytest.raises(FreqdoorError, match=f"format version {version}, .*{words}"):
        unpack(body + struct.pack("<I", zlib.crc32(body)), codec)


def test_compressais_coder_writes_no_files(codec):
    codec.coder = "compressai"
    with pytest.raises(FreqdoorError, match="keeps no checksums of what it codes"):
        pack(codec.compress(natural(1, 64, 64))[0], codec)
