"""What is written is whole or not there; links, devices, full disks and names of all kinds."""

import errno
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import freqdoor
from freqdoor.errors import FreqdoorError
from freqdoor.files import (
    name_and_file,
    read_text,
    refuse_overwriting,
    refuse_picture_name,
    replacing,
    with_slashes,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new/a.txt"
    write_text(path, "old")

    def fail(error):
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    for error in (KeyboardInterrupt(), ValueError("odd")):
        with pytest.raises(type(error)):
            fail(error)
    with pytest.raises(FreqdoorError, match=r"a\.txt: could not write \(Permission denied\)"):
        fail(PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(FreqdoorError, match=r"a\.txt: could not write \(first line\)$"):
        fail(RuntimeError("first line\nsecond line"))
    assert (path.read_text(), names(tmp_path)) == ("old", ["a.txt"])


def test_two_at_once_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as one, replacing(path) as two:
        assert one != two
        assert {one.parent, two.parent} == {tmp_path}
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    assert names(tmp_path) == ["a.txt"]
    with replacing(tmp_path / ("a" * 251 + ".txt")) as partial:  # as long as a name can be
        assert partial.suffix == ".txt"  # libraries choose the format by it
        assert partial.name.startswith(".")
        partial.write_text("long")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_the_umask(tmp_path, mask, mode):
    """Safetensors would write files that nobody else can read."""
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "a.safetensors") as partial:
            save_file({"a": torch.zeros(1)}, partial)
        write_text(tmp_path / "a.txt", "a")
    finally:
        os.umask(before)
    for name in ("a.safetensors", "a.txt"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    real, link, new = tmp_path / "there/real.txt", tmp_path / "link.txt", tmp_path / "new.txt"
    real.write_text("old")
    link.symlink_to(real)
    new.symlink_to("there/made.txt")
    write_text(link, "content")
    write_text(new, "made")
    assert link.is_symlink()
    assert real.read_text() == "content"
    assert (tmp_path / "there/made.txt").read_text() == "made"
    loop = tmp_path / "loop.txt"
    loop.symlink_to("loop.txt")
    with pytest.raises(FreqdoorError, match=r"loop\.txt: this link leads back to itself"):
        write_text(loop, "x")
    assert loop.is_symlink()


def test_devices_pipes_and_folders_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-null").symlink_to(os.devnull)
    for path, kind in ((tmp_path, "folder"), (tmp_path / "pipe", "device or a pipe"), (tmp_path / "to-null", "device")):
        with pytest.raises(FreqdoorError, match=f"expected the name of a file to write, found a {kind}"):
            write_text(path, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(FreqdoorError, match=r"b\.txt: could not write \(.*a\.txt is a file and no folder\)"):
        write_text(write_and_name(tmp_path) / "b.txt", "x")


def write_and_name(folder):
    write_text(folder / "a.txt", "a")
    return folder / "a.txt"


TENSORS = {"a": torch.zeros(100_000)}


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(400_000)),
        lambda path: save_file(TENSORS, path),
        lambda path: torch.save(TENSORS, path),
    ],
    ids=["bytes", "safetensors", "torch"],
)
def test_a_full_disk_is_called_one_whoever_writes(tmp_path, write):
    """A limit on files' sizes fails as a full disk does; after room was made, the same works."""
    path = tmp_path / "a.bin"
    path.write_text("old")

    def save():
        with replacing(path) as partial:
            write(partial)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(FreqdoorError) as caught:
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"{path}: could not write (no space left on the disk for a file of this size)"
    assert (path.read_text(), names(tmp_path)) == ("old", ["a.bin"])
    save()
    assert path.stat().st_size >= 400_000
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "no space left on the disk"), (errno.EDQUOT, "no space left on the disk for ")]
)
def test_a_full_disk_in_the_systems_own_error(tmp_path, number, words):
    with pytest.raises(FreqdoorError) as caught, replacing(tmp_path / "a"):
        raise OSError(number, "in some language")
    assert words in str(caught.value)
    assert not names(tmp_path)


def test_settings_and_files_load_little():
    """A wrong config or --help shows at once: of the package, without what it exports, no heavy library is loaded."""
    code = (
        "import sys, types; package = types.ModuleType('freqdoor'); package.__path__ = [sys.argv[1]];"
        "sys.modules['freqdoor'] = package; import freqdoor.settings, freqdoor.files;"
        "assert not {'torch', 'numpy', 'PIL', 'matplotlib', 'compressai'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(freqdoor.__file__).parent)], check=True, timeout=60)


def test_originals_are_not_overwritten(tmp_path):
    source = tmp_path / "a.png"
    source.touch()
    (tmp_path / "link.png").symlink_to(source)
    (tmp_path / "hard.png").hardlink_to(source)
    (tmp_path / "sub").mkdir()
    for target in (source, tmp_path / "link.png", tmp_path / "hard.png", tmp_path / "sub/../a.png"):
        with pytest.raises(FreqdoorError, match="would overwrite the original"):
            refuse_overwriting(source, target)
    (tmp_path / "copy.png").touch()
    for target in (tmp_path / "copy.png", tmp_path / "absent.png"):
        refuse_overwriting(source, target)


def test_a_picture_name_is_refused_for_what_is_no_picture():
    for name in ("b.png", "B.JPG", "b.avif", "folder/b.heic"):
        with pytest.raises(FreqdoorError, match="a picture's name"):
            refuse_picture_name(name)
    for name in ("b.fqd", "b", "png", "b.png.fqd"):
        refuse_picture_name(name)


def test_texts_of_all_systems(tmp_path):
    path = tmp_path / "a.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        path.write_bytes("Jürgen 1\r\n".encode(encoding))
        assert read_text(path) == "Jürgen 1\r\n"
    for content in (b"a\0b", b"\xff\xfea", b"\x81\xfc"):
        path.write_bytes(content)
        with pytest.raises(FreqdoorError, match=r"could not read the list \(not a text"):
            read_text(path, "the list")
    for wrong, reason in ((tmp_path / "absent", "No such file"), (tmp_path, "Is a directory"), ("a\0", "null byte")):
        with pytest.raises(FreqdoorError, match=reason):
            read_text(wrong)


def test_backslashes_of_another_system(tmp_path):
    (tmp_path / "odd\\name").touch()
    assert with_slashes("odd\\name", tmp_path) == "odd\\name"
    assert with_slashes("odd\\name", tmp_path / "sub") == "odd/name"
    assert with_slashes(str(tmp_path / "odd\\name")) == str(tmp_path / "odd\\name")
    assert with_slashes("a/b.png", tmp_path) == "a/b.png"


def test_a_name_and_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("run=1", "run=2", "run"):
        (tmp_path / folder).mkdir()
        for name in ("net.toml", "c.safetensors", "w=3.pth"):
            (tmp_path / folder / name).touch()
    for text, parts in (
        ("net.toml", ("net.toml", None)),
        ("net.toml=", ("net.toml", None)),
        ("net.toml=absent.onnx", ("net.toml", "absent.onnx")),
        ("net.toml=absent=1.onnx", ("net.toml", "absent=1.onnx")),
        ("run=1/net.toml", ("run=1/net.toml", None)),
        ("run=1/absent.toml=package.module:factory", ("run=1/absent.toml", "package.module:factory")),
        ("run=1/net.toml=package.module:factory", ("run=1/net.toml", "package.module:factory")),
        ("run=1/net.toml=run=2/w=3.pth", ("run=1/net.toml", "run=2/w=3.pth")),
        ("run=1/c.safetensors", ("run=1/c.safetensors", None)),
        ("run=1", ("run=1", None)),
        ("lite-hyperprior:3=run=1/w=3.pth", ("lite-hyperprior:3", "run=1/w=3.pth")),
        ("lite-hyperprior:3=absent.pth", ("lite-hyperprior:3", "absent.pth")),
        ("lite-hyperprior:3", ("lite-hyperprior:3", None)),
        ("module:factory=run=1/w=3.pth", ("module:factory", "run=1/w=3.pth")),
        ("run=1/c.safetensors=run=2/c.safetensors", ("run=1/c.safetensors", "run=2/c.safetensors")),
        ("run/c.safetensors=run/w=3.pth", ("run/c.safetensors", "run/w=3.pth")),
    ):
        assert name_and_file(text) == parts, text
