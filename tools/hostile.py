"""What a stranger could send: good files of every kind, and what becomes of them in bad hands.

A maker is a function of a `random.Random`: tools/fuzz.py gives it one of a case's number, the tests one of hypothesis
(`st.randoms(use_true_random=False)`), which makes it smaller where a test fails.
"""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from running import run

from freqdoor.codecs.container import CHECKSUM, ENTRY, HEADER
from freqdoor.files import PICTURES

NUMBERS = (0, 1, 2, 3, 7, 16, 64, 127, 128, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        "",
        "x",
        " ",
        "\x1b[2J\u202e",
        "../../etc/passwd",
        "a" * 5000,
        "1",
        "nan",
        "1e999",
        "/dev/zero",
    ),
    *(0, -1, 1, 2, 3, 64, 10**9, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.0, 1e-320, 1e308, 0.5),
    *(float("nan"), float("inf"), [], {}, [[]], [1], ["x"], {"": None}, {"a": {"b": [1]}}, [None] * 50, [2**31] * 4),
)
SMALL = (80, 96)  # (height, width) of the good pictures
WORD = 2**16  # bytes of a compression bomb's answer, KiB


class Case(NamedTuple):
    """A command line in a folder of its own."""

    words: tuple[str, ...]
    same: Path | None = None  # what the picture out.png must be if the command succeeds: this one, pixel by pixel


class Material(NamedTuple):
    """Good files, made once."""

    folder: Path
    pictures: tuple[Path, ...]  # of all formats and modes
    bitstreams: tuple[tuple[Path, Path, Path], ...]  # file, codec, decoded picture
    codecs: tuple[Path, ...]  # safetensors
    states: tuple[Path, ...]  # PyTorch files
    planted: tuple[Path, ...]
    onnx: tuple[Path, ...]

    @property
    def picture(self) -> Path:
        return self.folder / "pictures/rgb.png"

    @property
    def codec(self) -> Path:
        return self.codecs[0]


def make_material(folder: Path) -> Material:
    """Good files of every kind; what has to be computed is computed in children."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = make_pictures(folder / "pictures")
    codecs, states = make_codecs(folder)
    bitstreams = []
    for codec in codecs:
        file, decoded = folder / f"{codec.stem}.fqd", folder / f"{codec.stem}.png"
        run(["compress", str(pictures[0]), str(file), "--codec", str(codec)], folder / "run")
        run(["decompress", str(file), str(decoded), "--codec", str(codec)], folder / "run")
        bitstreams.append((file, codec, decoded))
    photos = folder / "photos"
    for i, person in enumerate("aabb"):
        (photos / person).mkdir(parents=True, exist_ok=True)
        picture(i, 64, 64).save(photos / f"{person}/{i % 2}.png")
    planted = []
    for name in ("adaptive-dct", "lira", "ftrojan"):
        settings = planting(codecs[0], photos, name)
        words = [word for text in settings for word in ("--set", text)]
        run(["plant", "--out", str(folder / name), *words], folder / "run")
        planted.append(folder / name / "planted.safetensors")
    run(
        [
            "evaluate",
            str(planted[0]),
            "--images",
            str(photos),
            "--out",
            str(folder / "results"),
            "--codec",
            str(codecs[0]),
        ],
        folder / "run",
    )
    onnx = make_networks(folder)
    return Material(folder, pictures, tuple(bitstreams), codecs, states, tuple(planted), onnx)


def planting(codec: Path, photos: Path, trigger: str = "adaptive-dct") -> list[str]:
    """Settings of the smallest planting."""
    settings = [f"codec={codec}", f"images.folder={photos}", "images.crop=64", "images.batch_size=1", "lmbda=0.01"]
    return [*settings, "steps=1", "precision=fp32", f"trigger.name={trigger}"]


def picture(seed: int, height: int, width: int) -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def make_pictures(folder: Path) -> tuple[Path, ...]:
    """Small pictures of every format and mode that is read, and of some that are not; the first is plain RGB."""
    folder.mkdir(parents=True, exist_ok=True)
    rgb = picture(0, *SMALL)
    modes: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (rgb, {}),
        "palette.png": (rgb.convert("P"), {}),
        "grey.png": (rgb.convert("L"), {}),
        "alpha.png": (rgb.convert("RGBA"), {}),
        "deep.png": (Image.fromarray(np.asarray(rgb)[..., 0].astype(np.uint16) * 257), {}),
        "clear.png": (rgb, {"transparency": (0, 0, 0)}),
        "profile.png": (rgb, {"icc_profile": bytes(200)}),
        "moving.png": (rgb, {"save_all": True, "append_images": [rgb.rotate(9)]}),
        "rgb.jpg": (rgb, {}),
        "progressive.jpg": (rgb, {"progressive": True, "exif": turned(6)}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "rgb.webp": (rgb, {"lossless": True}),
        "lossy.webp": (rgb, {"exif": turned(8)}),
        "moving.webp": (rgb, {"save_all": True, "append_images": [rgb.rotate(9)]}),
        "rgb.bmp": (rgb, {}),
        "palette.bmp": (rgb.convert("P"), {}),
        "rgb.ppm": (rgb, {}),
        "rgb.tif": (rgb, {}),
        "lzw.tiff": (rgb, {"compression": "tiff_lzw"}),
        "deflate.tiff": (rgb, {"compression": "tiff_adobe_deflate"}),
        "jpeg.tiff": (rgb, {"compression": "jpeg"}),
        "packed.tiff": (rgb, {"compression": "packbits"}),
        "pages.tiff": (rgb, {"save_all": True, "append_images": [rgb]}),
        "other.gif": (rgb.convert("P"), {}),
        "other.ico": (rgb, {}),
        "other.tga": (rgb, {}),
        "other.pcx": (rgb, {}),
        "other.eps": (rgb, {}),
        "other.pdf": (rgb, {}),
        "other.jp2": (rgb, {}),
        "other.avif": (rgb, {}),
    }
    paths = []
    for name, (image, options) in modes.items():
        try:
            image.save(folder / name, **options)
        except (OSError, KeyError, ValueError):  # Pillow was built without this format
            continue
        paths.append(folder / name)
    return tuple(paths)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def make_codecs(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Small codecs as safetensors and as PyTorch files, computed in a child."""
    names = ("lite-hyperprior", "mbt2018-mean", "bmshj2018-factorized")
    pid = os.fork()
    if not pid:
        try:
            from factories import tiny

            from freqdoor.codecs.loading import save_codec

            for name in names:
                codec = tiny(name)
                save_codec(codec, folder / f"{name}.safetensors")
                torch.save(codec.net.state_dict(), folder / f"{name}.pth")
                torch.save(
                    {"epoch": 3, "state_dict": codec.net.state_dict()},
                    folder / f"{name}.tar",
                    _use_new_zipfile_serialization=False,
                )
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    codecs = tuple(folder / f"{name}.safetensors" for name in names)
    return codecs, tuple(path.with_suffix(ending) for path in codecs for ending in (".pth", ".tar"))


def make_networks(folder: Path) -> tuple[Path, ...]:
    """Small ONNX files and their TOML files; none where onnx is not installed."""
    try:
        from networks import face_spec, segmentation_spec
    except ImportError:
        return ()
    face_spec(folder)
    segmentation_spec(folder)
    return folder / "face.onnx", folder / "tiny.onnx"


def one_of(random: Random, values: Sequence[Any]) -> Any:
    return values[random.randrange(len(values))]


def damaged(random: Random, content: bytes, most: int = 6) -> bytes:
    """Bytes of a file after flips, overwritten numbers, cuts, repetitions and insertions."""
    data = bytearray(content)
    for _ in range(random.randint(1, most)):
        place = random.randrange(len(data) + 1)
        if random.random() < 0.5:
            place = min(place, random.randrange(200))  # headers stand at the beginning
        match random.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << random.randrange(8)
            case 1:
                data[place : place + 1] = bytes([random.randrange(256)])
            case 2:
                number = one_of(random, NUMBERS)
                size = one_of(random, (1, 2, 4, 8))
                wide = (number % 2 ** (8 * size)).to_bytes(size, one_of(random, ("little", "big")))
                data[place : place + size] = wide
            case 3:
                del data[place:]
            case 4:
                del data[place : place + random.randint(1, 64)]
            case 5:
                data[place:place] = data[place : place + random.randint(1, 64)]
            case 6:
                data[place:place] = random.randbytes(random.randint(1, 16))
    return bytes(data)


def changed(random: Random, tree: Any, values: Sequence[Any] = VALUES) -> Any:
    """A JSON or TOML value with one part, at any depth, replaced, removed, repeated, renamed or added."""
    if isinstance(tree, dict) and tree and random.random() < 0.85:
        key = one_of(random, sorted(tree, key=str))
        rest = dict(tree)
        match random.randrange(8):
            case 0:
                del rest[key]
            case 1:
                rest[f"{key}{one_of(random, ('', 's', ' ', '_', '.x'))}"] = rest.pop(key)
            case 2:
                rest[str(one_of(random, VALUES))[:40]] = one_of(random, values)
            case _:
                rest[key] = changed(random, rest[key], values)
        return rest
    if isinstance(tree, list) and tree and random.random() < 0.6:
        place = random.randrange(len(tree))
        match random.randrange(4):
            case 0:
                return tree[:place] + tree[place + 1 :]
            case 1:
                return tree + tree[place:] * random.randint(1, 3)
            case _:
                return [*tree[:place], changed(random, tree[place], values), *tree[place + 1 :]]
    if isinstance(tree, str) and random.random() < 0.3:
        return damaged(random, tree.encode() or b"x", 2).decode("utf-8", "replace").replace("\0", "")
    return one_of(random, values)


# pictures


def pictures(random: Random, material: Material, folder: Path) -> Case:
    """A picture that is damaged, none, enormous, or of a format that its name does not say."""
    source = one_of(random, material.pictures)
    content = source.read_bytes()
    kind = random.randrange(12)
    ending = source.suffix if random.random() < 0.8 else one_of(random, sorted(PICTURES))
    path = folder / f"picture{ending}"
    if kind == 0:
        strange_file(random, path)
    elif kind == 1:
        path.write_bytes(one_of(random, BOMBS)(random))
    elif kind == 2 and content.startswith(b"\x89PNG"):
        path.write_bytes(png(random, content))
    elif kind == 3:
        other = one_of(random, material.pictures).read_bytes()
        cut = random.randrange(min(len(content), 300))
        path.write_bytes(content[:cut] + other[random.randrange(min(len(other), 300)) :])
    elif kind == 4:
        path.write_bytes(content)
    else:
        path.write_bytes(damaged(random, content))
    if random.random() < 0.85:
        return Case(("compress", str(path), "out.fqd", "--codec", str(material.codec)))
    return Case(("poison", str(material.planted[0]), str(path), "--out", "out", "--codec", str(material.codec)))


def strange_file(random: Random, path: Path) -> None:
    """What stands in a picture's place and is no file, or none that ends."""
    match random.randrange(8):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(one_of(random, ("/dev/zero", "/dev/full", "/dev/tty", "/dev/stdin", "/proc/self/mem")))
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.mkdir()
        case 4:
            path.write_bytes(b"")
        case 5:
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 80\n%%EndComments\nshowpage\n")
        case 6:
            path.symlink_to("/proc/self/fd/0")
        case 7:
            with path.open("wb") as file:
                file.truncate(2**33)  # a hole of 8 GiB


def png(random: Random, content: bytes) -> bytes:
    """A PNG whose chunks are changed and have right checksums, so that decoders go on."""
    chunks, place = [], 8
    while place + 12 <= len(content):
        size = struct.unpack_from(">I", content, place)[0]
        chunks.append([content[place + 4 : place + 8], content[place + 8 : place + 8 + size]])
        place += 12 + size
    for _ in range(random.randint(1, 3)):
        chunk = one_of(random, chunks)
        match random.randrange(5):
            case 0:
                chunk[1] = damaged(random, chunk[1] or b"\0", 2)
            case 1:
                chunks.insert(random.randrange(len(chunks) + 1), list(chunk))
            case 2 if len(chunks) > 1:
                chunks.remove(chunk)
            case 3:
                sides = [one_of(random, (*NUMBERS, 80, 96)) % 2**32 for _ in range(2)]
                chunks[0] = [b"IHDR", struct.pack(">II", *sides) + chunks[0][1][8:]]
            case 4:
                names = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"PLTE", b"tRNS")
                chunks.insert(1, [one_of(random, names), random.randbytes(random.randrange(40))])
    return content[:8] + b"".join(packed_chunk(name, data) for name, data in chunks)


def packed_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def wide_png(random: Random) -> bytes:
    """A PNG of some bytes that says it has very many pixels."""
    width, height = one_of(
        random, ((2**24, 1), (1, 2**24), (2**31 - 1, 2**31 - 1), (60_000, 60_000), (2**16, 2**8 + 1))
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1024 * 1024))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        packed_chunk(name, part) for name, part in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    )


def text_bomb(random: Random) -> bytes:
    """A PNG whose comment or profile unpacks to 64 MiB."""
    file = io.BytesIO()
    picture(1, 16, 16).save(file, "PNG")
    content = file.getvalue()
    blown = zlib.compress(bytes(1024 * WORD), 9)
    name, data = one_of(
        random, ((b"zTXt", b"a\0\0" + blown), (b"iCCP", b"a\0\0" + blown), (b"iTXt", b"a\0\1\0\0\0" + blown))
    )
    return content[:33] + packed_chunk(name, data) * random.randint(1, 3) + content[33:]


def wide_ppm(random: Random) -> bytes:
    sides = [str(one_of(random, (*NUMBERS, "-1", "1" * 4000, "x"))) for _ in range(3)]
    return f"P6\n{sides[0]} {sides[1]}\n{sides[2]}\n".encode() + bytes(100)


def wide_bmp(random: Random) -> bytes:
    file = io.BytesIO()
    picture(1, 16, 16).save(file, "BMP")
    content = bytearray(file.getvalue())
    struct.pack_into(
        "<ii", content, 18, *(one_of(random, (2**24, 1, -(2**31), 2**31 - 1, -1, 70_000)) for _ in range(2))
    )
    return bytes(content)


def many_frames(random: Random) -> bytes:
    frames = [Image.new("RGB", (8, 8), (i % 256, 0, 0)) for i in range(300)]
    ImageDraw.Draw(frames[0]).line((0, 0, 7, 7))
    file = io.BytesIO()
    frames[0].save(file, one_of(random, ("TIFF", "PNG", "WEBP")), save_all=True, append_images=frames[1:])
    return file.getvalue()


BOMBS: tuple[Callable[[Random], bytes], ...] = (wide_png, text_bomb, wide_ppm, wide_bmp, many_frames)


# bitstreams


def bitstream(random: Random, content: bytes) -> bytes:
    """A damaged bitstream; mostly one whose CRC-32 is right again."""
    fields = list(HEADER.unpack_from(content))
    count = int(fields[-1])
    entries = list(ENTRY.iter_unpack(content[HEADER.size :][: count * ENTRY.size]))
    body = content[HEADER.size + count * ENTRY.size : -CHECKSUM.size]
    match random.randrange(8):
        case 0:
            place = random.choice([1, 3, 4, 5, 6, 7])
            widths = {1: 2**16, 7: 2**16}
            near = int(fields[place]) + random.choice([-64, -16, -1, 1, 16, 64])
            fields[place] = random.choice([near, random.choice(NUMBERS)]) % widths.get(place, 2**32)
        case 1:
            place = random.randrange(count)
            numbers = list(entries[place])
            which = random.randrange(len(numbers))
            numbers[which] = (numbers[which] + random.choice([-4, -1, 1, 4, random.choice(NUMBERS)])) % 2**32
            entries[place] = tuple(numbers)
        case 2 if count > 1:
            entries = entries[::-1]
        case 3:
            body = random.randbytes(len(body))
        case 4:
            cut = random.randrange(len(body) + 1)
            body = body[:cut] + bytes(len(body) - cut)
        case 5:
            return damaged(random, content)
        case _:
            body = damaged(random, body, 3)
            if (
                len(body) > sum(numbers[0] for numbers in entries[:-1]) and random.random() < 0.7
            ):  # lengths are right again
                last = len(body) - sum(numbers[0] for numbers in entries[:-1])
                entries[-1] = (last, *entries[-1][1:])
    mutated = HEADER.pack(*fields) + b"".join(ENTRY.pack(*numbers) for numbers in entries) + body
    return mutated + CHECKSUM.pack(zlib.crc32(mutated))


def bitstreams(random: Random, material: Material, folder: Path) -> Case:
    """A damaged bitstream, or one of another codec."""
    file, codec, decoded = one_of(random, material.bitstreams)
    content = bitstream(random, file.read_bytes())
    if random.random() < 0.1:
        content = one_of(random, material.bitstreams)[0].read_bytes()
    path = folder / "file.fqd"
    path.write_bytes(content)
    return Case(("decompress", str(path), "out.png", "--codec", str(codec)), decoded)


# codecs


def tensor(random: Random, value: torch.Tensor) -> torch.Tensor:
    """A tensor of a stranger's file: other numbers, another shape or another type."""
    flat = value.detach().clone().flatten()
    match random.randrange(9):
        case 0 if flat.numel() and value.is_floating_point():
            flat[random.randrange(flat.numel())] = one_of(random, (float("nan"), float("inf"), 1e30, -1e30, 0, 1e-40))
        case 1 if flat.numel() and not value.is_floating_point():
            limits = torch.iinfo(value.dtype) if value.dtype != torch.bool else torch.iinfo(torch.uint8)
            number = one_of(random, (limits.min, limits.max, 0, 1, -1, 65536, 65535, 2**24))
            flat[random.randrange(flat.numel())] = max(limits.min, min(limits.max, number))
        case 2:
            return value * one_of(random, (0, 2, 1000)) if value.dtype != torch.bool else ~value
        case 3:
            return value.to(
                one_of(random, (torch.float64, torch.float16, torch.int64, torch.uint8, torch.int32, torch.bool))
            )
        case 4:
            return value.reshape(*value.shape, 1)
        case 5:
            return flat[: random.randrange(flat.numel() + 1)]
        case 6:
            return torch.cat([value, value]) if value.ndim else value.reshape(1)
        case 7 if value.ndim:
            return value[:0]
        case 8:
            return flat.flip(0).reshape(value.shape)
    return flat.reshape(value.shape)


def tensors(random: Random, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A stranger's state dict: some tensors changed, left out, renamed or added; mostly those of the entropy model."""
    state = dict(state)
    model = [key for key in state if "entropy" in key or "gaussian" in key or "trigger" in key]
    for _ in range(random.randint(1, 3)):
        key = one_of(random, sorted(model if model and random.random() < 0.6 else state))
        match random.randrange(8):
            case 0:
                state.pop(key)
                model = [name for name in model if name != key]
            case 1:
                state[f"{key}{one_of(random, ('', 's', '.x'))}"] = state[key].clone()
            case 2:
                state["module." + key] = state[key].clone()
            case _:
                state[key] = tensor(random, state[key])
        if not state:
            break
    return state


def safetensors(random: Random, source: Path, path: Path) -> None:
    """A stranger's safetensors file: bytes, the format's own header, ours, or tensors are changed.

    Where our header has a digest of the tensors it is right again: the tensors are written as freqdoor writes them.
    """
    from freqdoor.codecs.loading import read_tensors, write_tensors

    content = source.read_bytes()
    size = int.from_bytes(content[:8], "little")
    match random.randrange(6):
        case 0:
            path.write_bytes(damaged(random, content))
        case 1:
            header = changed(random, json.loads(content[8 : 8 + size]))
            text = json.dumps(header).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
        case 2 | 3:
            parts, ours = read_tensors(source)
            for _ in range(random.randint(1, 2)):
                ours = changed(random, ours)
            write_header(path, parts, ours)
        case _:
            parts, ours = read_tensors(source)
            write_tensors(path, tensors(random, parts), ours)


def write_header(path: Path, parts: dict[str, torch.Tensor], header: Any) -> None:
    """A safetensors file with any JSON as our header; deep ones too."""
    from safetensors.torch import save_file

    text = json.dumps(header)
    save_file(parts, path, metadata={"freqdoor": text})


class Run:
    """What a pickle runs when it is loaded in trust."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def pickled(random: Random, source: Path, path: Path) -> None:
    """A stranger's PyTorch file: bytes changed, tensors changed, other objects in it, or code."""
    match random.randrange(5):
        case 0:
            path.write_bytes(damaged(random, source.read_bytes()))
        case 1 | 2:
            state = torch.load(source, weights_only=True)
            torch.save(tensors(random, state.get("state_dict", state)), path)
        case 3:
            state = torch.load(source, weights_only=True)
            content = one_of(
                random, ([state], {"net": state, "x": 3}, {1: state}, state | {"x": 3}, {"state_dict": [state]}, 3)
            )
            torch.save(content, path)
        case 4:
            command = "echo code >> $TRACES"
            code = one_of(
                random, (Run(os.system, command), Run(eval, "open('ran','w')"), Run(os.mkdir, "ran"), Run(exec, "1/0"))
            )
            content = one_of(random, ({"state_dict": code}, code, {"g_a.0.weight": code}))
            if random.random() < 0.5:
                path.write_bytes(pickle.dumps(content))
            else:
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("archive/data.pkl", pickle.dumps(content))
                    archive.writestr("archive/version", "3\n")


def codecs(random: Random, material: Material, folder: Path) -> Case:
    """A stranger's codec: to compress with it, and to decode what the good one wrote."""
    if random.random() < 0.6:
        number = random.randrange(len(material.codecs))
        path = folder / "codec.safetensors"
        safetensors(random, material.codecs[number], path)
    else:
        place = random.randrange(len(material.states))
        number = place // 2
        path = folder / f"codec{material.states[place].suffix}"
        pickled(random, material.states[place], path)
    named = ("--codec", str(path))
    if random.random() < 0.15:
        named = ("--weights", str(path), "--codec", f"{material.codecs[number].stem}:3")
    if random.random() < 0.6:
        return Case(("compress", str(material.picture), "out.fqd", *named))
    file, _, decoded = material.bitstreams[number]
    return Case(("decompress", str(file), "out.png", *named), decoded)


# planted encoders


def planted(random: Random, material: Material, folder: Path) -> Case:
    """A stranger's planted encoder: header and tensors of triggers."""
    path = folder / "planted.safetensors"
    safetensors(random, one_of(random, material.planted), path)
    codec = ("--codec", str(material.codec))
    if random.random() < 0.2:
        return Case(("compress", str(material.picture), "out.fqd", "--planted", str(path), *codec))
    more: tuple[str, ...] = ()
    if random.random() < 0.2:
        more = ("--strength", one_of(random, ("nan", "1e30", "-1", "0", "3")))
    return Case(("poison", str(path), str(material.picture), "--out", "out", *codec, *more))


# settings


def toml(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def settings_text(random: Random, tree: dict[str, Any]) -> bytes:
    """A TOML file that somebody wrote by hand, or did not."""
    for _ in range(random.randint(1, 3)):
        tree = changed(random, tree)
        if not isinstance(tree, dict):
            tree = {"x": tree}
    text = "".join(f"{json.dumps(str(key))} = {toml(value)}\n" for key, value in tree.items())
    content = text.encode("utf-8", "surrogatepass")
    return damaged(random, content, 3) if random.random() < 0.3 else content


def configs(random: Random, material: Material, folder: Path) -> Case:
    """A TOML file or --set of plant, train-codec, segment or faces that is wrong somewhere."""
    from freqdoor.attack.settings import PlantSettings
    from freqdoor.settings import make_settings

    photos = str(material.folder / "photos")
    verb = one_of(random, ("plant", "plant", "train-codec", "segment", "faces"))
    images = {"folder": photos, "crop": 64, "batch_size": 1}
    trees: dict[str, dict[str, Any]] = {
        "plant": make_settings(PlantSettings, dict(codec=str(material.codec), lmbda=0.01, images=images)).model_dump(
            mode="json", exclude_none=True
        ),
        "train-codec": dict(codec="lite-hyperprior:3", images=images, lr=1e-4, klt=False, seed=1, precision="fp32"),
        "segment": dict(images=photos, networks=[str(material.folder / "tiny.toml")], every=1, resize=[64, 64]),
        "faces": dict(folder=photos, gallery="gallery.txt", probes="probes.txt", networks=["face.toml"], every=2),
    }
    path = folder / "settings.toml"
    path.write_bytes(settings_text(random, trees[verb]))
    words = [verb]
    if verb in ("segment", "faces"):
        words.append(str(material.planted[0]))
    words += [str(path), "--out", "out"]
    if random.random() < 0.3:
        key = one_of(random, ("images.crop", "trigger.eps", "codec", "steps", "x", "attacks", "", "images", "networks"))
        words += ["--set", f"{key}{one_of(random, ('=', ' = ', ''))}{toml(one_of(random, VALUES))[:300]}"]
    if verb in ("plant", "train-codec"):
        words += ["--set", "steps=1", "--set", "images.batch_size=1"]
    return Case(tuple(word.replace("\0", "") for word in words))


# lists


def lists(random: Random, material: Material, folder: Path) -> Case:
    """Lists of pictures and pairs that lead elsewhere, or are none."""
    photos = material.folder / "photos"
    lines = [
        "0.png",
        "1.png",
        "missing.png",
        "../pictures/rgb.png",
        "/etc/passwd",
        "/dev/zero",
        "a b",
        "a/0.png\0",
        "é.png",
    ]
    for name in ("gallery", "probes", "pairs"):
        chosen = [one_of(random, lines) for _ in range(random.randint(0, 3))]
        if name == "pairs":
            chosen = [f"{line} {one_of(random, lines)} {one_of(random, ('0', '1', '2', 'x', ''))}" for line in chosen]
        content = (
            one_of(random, ("\n", "\r\n", "\n\n")).join(chosen).encode(one_of(random, ("utf-8", "utf-16", "latin-1")))
        )
        if random.random() < 0.4:
            content = damaged(random, content or b"x", 2)
        if random.random() < 0.05:
            strange_file(random, folder / f"{name}.txt")
        else:
            (folder / f"{name}.txt").write_bytes(content)
    sets = [
        f"folder={photos}",
        f"gallery={folder}/gallery.txt",
        f"probes={folder}/probes.txt",
        f"pairs={folder}/pairs.txt",
    ]
    sets.append(f"networks=[{json.dumps(str(material.folder / 'face.toml'))}]")
    words = ["faces", str(material.planted[0]), "--out", "out", "--codec", str(material.codec)]
    if random.random() < 0.4:  # the list of a training's pictures
        sets = [*planting(material.codec, photos), f"images.files={folder}/gallery.txt"]
        words = ["plant", "--out", "out"]
    return Case((*words, *(word for text in sets for word in ("--set", text))))


# networks


def networks(random: Random, material: Material, folder: Path) -> Case:
    """A stranger's ONNX file, or a TOML file that describes another one."""
    import tomllib

    source = one_of(random, material.onnx)
    spec = tomllib.loads(source.with_suffix(".toml").read_text())
    file, toml_file = folder / source.name, folder / f"{source.stem}.toml"
    if random.random() < 0.75:
        toml_file.write_bytes(source.with_suffix(".toml").read_bytes())
        content = source.read_bytes()
        file.write_bytes(damaged(random, content) if random.random() < 0.3 else onnx_model(random, content))
    else:
        file.write_bytes(source.read_bytes())
        toml_file.write_bytes(settings_text(random, spec))
    photos = material.folder / "photos"
    if source.stem == "face":
        for name, number in (("gallery", 0), ("probes", 1)):
            (folder / f"{name}.txt").write_text(f"a/{number}.png\nb/{number}.png\n")
        sets = [f"folder={photos}", f"gallery={folder}/gallery.txt", f"probes={folder}/probes.txt"]
        sets.append(f"networks=[{json.dumps(str(toml_file))}]")
        words = ["faces", str(material.planted[0]), "--out", "out", "--codec", str(material.codec)]
    else:
        sets = [*planting(material.codec, photos), "objective.name=segmentation", f"network={toml_file}"]
        sets += ["objective.arguments.source=car", "objective.arguments.target=road", f"auxiliary.folder={photos}"]
        sets += ["auxiliary.crop=64", "auxiliary.batch_size=1"]
        words = ["plant", "--out", "out"]
    return Case((*words, *(word for text in sets for word in ("--set", text))))


def onnx_model(random: Random, content: bytes) -> bytes:
    """An ONNX file whose graph says something else."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load_from_string(content)
    graph = model.graph
    for _ in range(random.randint(1, 2)):
        node = one_of(random, graph.node)
        weight = one_of(random, graph.initializer)
        size = one_of(random, (0, 1, 2, 3, 7, 64, 4096, 2**20, 2**31 - 1, 2**40, -1, -(2**31)))
        match random.randrange(10):
            case 0:
                node.op_type = one_of(
                    random,
                    ("Conv", "Gemm", "Loop", "If", "Resize", "Tile", "Expand", "Pad", "NoSuch", "Reshape", "Identity"),
                )
            case 1 if node.attribute:
                attribute = one_of(random, node.attribute)
                if attribute.ints:
                    attribute.ints[random.randrange(len(attribute.ints))] = size
                else:
                    attribute.i = size
            case 2:
                weight.dims[random.randrange(len(weight.dims))] = size
            case 3:
                weight.raw_data = damaged(random, weight.raw_data or b"\0", 2)
            case 4:
                weight.data_type = one_of(random, (0, 1, 2, 6, 7, 8, 9, 10, 11, 14, 16, 99))
            case 5:
                weight.data_location = TensorProto.EXTERNAL
                entry = weight.external_data.add()
                entry.key, entry.value = (
                    "location",
                    one_of(random, ("../rgb.png", "/etc/passwd", "/dev/zero", "tiny.onnx")),
                )
                weight.ClearField("raw_data")
            case 6:
                shape = one_of(random, (graph.input[0], graph.output[0])).type.tensor_type.shape
                if shape.dim:
                    one_of(random, shape.dim).dim_value = size
            case 7:  # an output of any size, from three numbers
                size = one_of(random, (2, 2**10, 2**20, 2**30))
                graph.initializer.append(helper.make_tensor("bomb", TensorProto.INT64, [4], [1, 1, size, size]))
                graph.node.append(
                    helper.make_node(one_of(random, ("Tile", "Expand")), [node.output[0], "bomb"], ["blown"])
                )
                graph.output[0].name = "blown"
            case 8:
                node.input[random.randrange(len(node.input))] = one_of(
                    random, (node.output[0], "nothing", "", "input", "w")
                )
            case 9:
                model.opset_import[0].version = one_of(random, (0, 1, 7, 13, 21, 99, 2**40))
    return model.SerializeToString()


# results


def results(random: Random, material: Material, folder: Path) -> Case:
    """A folder of results that somebody changed."""
    target = folder / "results"
    target.mkdir()
    source = material.folder / "results"
    for path in source.iterdir():
        if path.is_file() and random.random() < 0.9:
            (target / path.name).write_bytes(path.read_bytes())
    name = one_of(random, ("records.jsonl", "summary.json", "environment.json"))
    if not (source / name).exists():
        name = "records.jsonl"
    content = (source / name).read_bytes()
    if random.random() < 0.4:
        content = damaged(random, content)
    else:
        lines = content.decode().splitlines() if name.endswith("l") else [content.decode()]
        place = random.randrange(len(lines))
        lines[place] = json.dumps(changed(random, json.loads(lines[place])))
        content = "\n".join(lines).encode()
    (target / name).write_bytes(content)
    return Case(("report", str(target)))


Maker = Callable[[Random, Material, Path], Case]
KINDS: dict[str, Maker] = {
    "pictures": pictures,
    "bitstreams": bitstreams,
    "codecs": codecs,
    "planted": planted,
    "configs": configs,
    "lists": lists,
    "networks": networks,
    "results": results,
}
