"""Pictures in tar files: the batches of a folder, and one sentence for whatever else a tar file holds."""

import io
import struct
import tarfile
from pathlib import Path

import pytest
import torch

from freqdoor.attack.settings import PlantSettings
from freqdoor.data import Crops, check_image, list_images, list_training_images, load_image
from freqdoor.errors import FreqdoorError
from freqdoor.settings import make_settings
from freqdoor.shards import Packed, list_shards, packed_in
from freqdoor.training.loop import open_folder
from freqdoor.training.settings import ImageSettings


def pack(path: Path, files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(images, tmp_path):
    """The four pictures of `images` in two shards, among other files, with names of every length."""
    (tmp_path / "shards").mkdir()
    content = {path.name: path.read_bytes() for path in list_images(images)}
    first = {name: content[name] for name in ("0.png", "1.png")} | {"0.json": b"{}", "._1.png": b"hidden"}
    long = {f"{'folder/' * 30}{name}": content[name] for name in ("2.png", "3.png")}
    pack(tmp_path / "shards/009.tar", first)
    pack(tmp_path / "shards/010.tar", long, tarfile.PAX_FORMAT)
    return tmp_path / "shards"


def test_shards_give_the_batches_of_the_folder_bit_by_bit(images, shards):
    options = {"crop": 64, "batch_size": 5, "seed": 3}
    of_folder = Crops(list_images(images), **options)
    for place in (shards, f"{shards}/{{009..010}}.tar"):
        of_shards = open_folder(ImageSettings(folder=str(place), crop=64, batch_size=5), 3)
        assert of_shards.facts() == of_folder.facts()
        for step in (0, 7, -1):
            assert torch.equal(of_shards.batch(step), of_folder.batch(step))
            assert torch.equal(of_shards.batch(step, slice(1, 3)), of_folder.batch(step)[1:3])
    assert [str(path) for path in of_shards.paths][:2] == [f"{shards}/009.tar/0.png", f"{shards}/009.tar/1.png"]
    assert check_image(of_shards.paths[0]) == (96, 128)
    assert torch.equal(load_image(of_shards.paths[3]), load_image(images / "3.png"))
    assert not list(shards.parent.rglob("*.png"))


def test_what_names_shards(images, shards):
    assert list_shards(images) == []
    assert list_shards(shards / "009.tar") == [shards / "009.tar"]
    assert [path.name for path in list_shards("a{8..10}/{00..01}.tar")] == ["00.tar", "01.tar"] * 3
    assert [path.parent.name for path in list_shards("a{8..10}/{00..01}.tar")] == ["a8"] * 2 + ["a9"] * 2 + ["a10"] * 2
    (shards / "x.png").write_bytes((images / "0.png").read_bytes())
    assert list_training_images(shards) == [shards / "x.png"]  # a folder of pictures stays what it was
    for text, sentence in (
        ("s/{3..1}.tar", "found one that ends before it begins"),
        ("s/{0..999999999}.tar", "at most 100000 shards"),
        ("s/{0..1}.tar", r"s/0\.tar: expected a tar file of pictures, found nothing there"),
    ):
        with pytest.raises(FreqdoorError, match=sentence):
            list_training_images(text)
    pack(shards / "009.tar", {"a.txt": b"text"})
    with pytest.raises(FreqdoorError, match="in these shards, found none"):
        list_training_images(shards / "009.tar")
    settings = ImageSettings(folder=f"{shards}/{{009..010}}.tar", files="list.txt")
    with pytest.raises(FreqdoorError, match="files: a list names pictures in a folder"):
        open_folder(settings, 0)
    content = {"images": {"folder": f"{shards}/{{009..010}}.tar"}, "steps": 0}
    with pytest.raises(FreqdoorError, match="1 mistake") as caught:
        make_settings(PlantSettings, content, out=shards / "run")
    assert "folder" not in str(caught.value)


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header of a tar file, as a hostile program writes it."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124 : 124 + len(size)], block[156:157], block[257:265] = (
        b"0000644\0",
        size,
        kind,
        b"ustar\x0000",
    )
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def hostile(kind: str, picture: bytes) -> bytes:
    whole, end = io.BytesIO(), bytes(1024)
    if kind in ("link", "symlink", "device"):
        with tarfile.open(fileobj=whole, mode="w") as tar:
            info = tarfile.TarInfo("a.png")
            info.type = {"link": tarfile.LNKTYPE, "symlink": tarfile.SYMTYPE, "device": tarfile.CHRTYPE}[kind]
            info.linkname = "/etc/passwd"
            tar.addfile(info)
        return whole.getvalue()
    name = {"absolute": "/a.png", "above": "b/../../a.png"}.get(kind, "a.png")
    info = tarfile.TarInfo(name)
    info.size = len(picture)
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for _ in range(2):
            whole.seek(0, 2)
            tar.addfile(info, io.BytesIO(picture))
    content = whole.getvalue()
    second = 512 + -(-len(picture) // 512) * 512
    return {
        "gzip": b"\x1f\x8b" + bytes(100),
        "text": b"not a tar file" * 100,
        "empty": b"",
        "cut in a picture": content[: second + 700],
        "cut between two": content[:second],
        "damaged header": content[: second + 10] + b"?" + content[second + 11 :],
        "longer than the file": header(b"a.png", b"77777777777\0") + picture + end,
        "negative": header(b"a.png", b"\xff" * 12) + end,
        "negative extension": header(b"x", b"\xff" * 12, b"x") + end,
        "enormous extension": header(b"x", struct.pack(">BxxxQ", 0x80, 2**50), b"x") + end,
        "enormous name": header(b"x", struct.pack(">BxxxQ", 0x80, 2**50), b"L") + end,
        "extensions of extensions": header(b"x", b"00000000000\0", b"x") * 5000 + end,
        "sparse": header(b"a.png", b"00000000000\0", b"S") + end,
    }.get(kind, content)


KINDS = (
    "link",
    "symlink",
    "device",
    "absolute",
    "above",
    "gzip",
    "text",
    "empty",
    "cut in a picture",
    "cut between two",
)
KINDS += ("damaged header", "longer than the file", "negative", "negative extension", "enormous extension")
KINDS += ("enormous name", "extensions of extensions", "sparse")


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_shard_is_one_sentence(kind, images, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(hostile(kind, (images / "0.png").read_bytes()))
    with pytest.raises(FreqdoorError, match=r"a\.tar: expected (a tar file|plain files|names inside)") as caught:
        packed_in(path)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_an_honest_shard_is_read(images, tmp_path):
    """What the hostile ones are made from."""
    path = tmp_path / "a.tar"
    path.write_bytes(hostile("none", (images / "0.png").read_bytes()))
    assert [picture.name for picture in packed_in(path)] == ["a.png", "a.png"]
    [first, second] = packed_in(path)
    assert torch.equal(load_image(first), load_image(second))
    cut = Packed(path, "a.png", second.offset, second.size // 2)
    with pytest.raises(FreqdoorError, match=r"a\.tar/a\.png: truncated"):
        load_image(cut)
