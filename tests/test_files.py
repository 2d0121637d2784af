"""What is written is whole or not there; links, devices, full disks and names of all kinds."""

import errno
import json
import os
import platform
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from conftest import room_for
from safetensors.torch import save_file

import freqdoor
from freqdoor.data import save_image
from freqdoor.errors import FreqdoorError
from freqdoor.files import (
    check_outputs,
    check_writable,
    made_by,
    mark,
    marked_json,
    marked_markdown,
    name_and_file,
    read_text,
    refuse_overwriting,
    refuse_picture_name,
    remove_leftovers,
    replacing,
    unmarked,
    with_slashes,
    write_text,
    write_together,
)

ROOT = Path(__file__).parent.parent
OLD = ROOT / "tests/old"


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


def test_a_file_that_is_there_keeps_its_permissions(tmp_path):
    """What its owner has hidden does not become public; rights of another user are not handed on."""
    path = tmp_path / "a.txt"
    for before, after in ((0o600, 0o600), (0o666, 0o666), (0o6755, 0o755), (0o1644, 0o644)):
        path.touch()
        path.chmod(before)
        write_text(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == after
    (tmp_path / "other").hardlink_to(path)
    write_text(path, "newer")
    assert (tmp_path / "other").read_text() == "new"


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "access", lambda path, how: False)  # root may write everything
    with pytest.raises(FreqdoorError, match=r"a\.txt: could not write \(this file is write-protected\)"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    write_text(tmp_path / "b.txt", "new")


def test_names_of_all_kinds(tmp_path):
    for name in ("a\nb\tc.txt", "\x1b[31m.txt", "-o", " ", "ü" * 127, "a" * 255, ".partial-", "*?[a].png"):
        write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    for name, reason in (("a" * 256, "File name too long"), ("x/" * 3000, "File name too long")):
        with pytest.raises(FreqdoorError, match=rf"could not write \({reason}\)$"):
            write_text(tmp_path / name, "x")
    with pytest.raises(FreqdoorError, match="found a zero byte in it"):
        write_text(tmp_path / "a\0b", "x")
    assert len(names(tmp_path)) == 8


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path):
    write_text(tmp_path / "file", "old")
    (tmp_path / "link").symlink_to("nowhere")
    for act in (lambda path: write_text(path, "x"), check_writable):
        with pytest.raises(FreqdoorError, match=r"x\.txt: could not write \(.*/file is a file and no folder\)"):
            act(tmp_path / "file/new/x.txt")
    for name in ("new/folder/x.txt", "link/x.txt"):
        check_writable(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    write_text(tmp_path / "link/x.txt", "new")
    assert ((tmp_path / "nowhere/x.txt").read_text(), (tmp_path / "file").read_text()) == ("new", "old")


def test_several_files_are_replaced_together_or_not_at_all(tmp_path, monkeypatch):
    old = {tmp_path / name: "old" for name in ("a.json", "b.md", "c.html")}
    new = {path: "new" for path in [tmp_path / "d.png", *old]}
    write_together(old)
    with room_for(10_000), pytest.raises(FreqdoorError) as caught:
        write_together(new | {tmp_path / "d.png": bytes(50_000)})
    reason = "no space left on the disk for a file of this size"
    assert str(caught.value) == f"{tmp_path / 'd.png'} and 3 more: could not write ({reason})"
    real = Path.replace
    for failure in (PermissionError(errno.EPERM, "x"), KeyboardInterrupt()):
        for number in range(4):
            failures = iter([None] * number + [failure])

            def replace(path, target, failures=failures):
                if failure := next(failures, None):
                    raise failure
                return real(path, target)

            with monkeypatch.context() as patched:
                patched.setattr(Path, "replace", replace)
                with pytest.raises((FreqdoorError, KeyboardInterrupt)):
                    write_together(new)
            assert {path: path.read_text() for path in old} == old
            assert names(tmp_path) == ["a.json", "b.md", "c.html"]
    write_together(new)
    assert {path: path.read_text() for path in new} == new
    assert len(names(tmp_path)) == 4


PICTURE = torch.rand(1, 3, 40, 50)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif", ".PNG"])
def test_a_picture_says_which_verb_made_it(tmp_path, ending):
    for size, verb in (((40, 50), "poison"), ((300, 400), "decompress")):
        save_image(tmp_path / f"a{ending}", torch.rand(1, 3, *size), verb)
        assert made_by(tmp_path / f"a{ending}") == verb
    save_image(tmp_path / f"a{ending}", PICTURE)
    assert made_by(tmp_path / f"a{ending}") is None


def test_texts_say_which_verb_made_them(tmp_path):
    texts = {
        "a.json": marked_json('{\n "a": 1}', "segment"),
        "b.json": marked_json('{"a":1}', "segment"),
        "a.md": marked_markdown("# A page\n" + 50_000 * "words\n", "segment"),
        "a.html": f'<!doctype html>\n<html><head>\n<meta name="generator" content="{mark("segment")}">\n',
    }
    for name, text in texts.items():
        write_text(tmp_path / name, text)
        assert made_by(tmp_path / name) == "segment"
    assert json.loads(texts["a.json"]) == json.loads(texts["b.json"]) == {"made_by": "freqdoor segment", "a": 1}
    assert unmarked(texts["a.md"]) == "# A page\n" + 50_000 * "words\n"


def test_files_of_earlier_versions_are_known_by_their_form(tmp_path):
    known = {name: "evaluate" for name in ("records.jsonl", "facts.json", "summary.json")} | {
        "analysis.json": "analyse"
    }
    for name, verb in known.items():
        assert made_by(OLD / name) == verb
    for path in (ROOT / "docs/results").rglob("*.*"):
        if path.suffix == ".json":
            assert made_by(path) == ("analyse" if path.stem == "analysis" else "reproduce"), path
    assert made_by(ROOT / "docs/results/table4.md") == "reproduce"
    for text, verb in (
        ('{"source": "cars", "target": "road", "images": 2}', "segment"),
        ('{\n "schema": 2,\n "persons": 2,\n "gallery": 4}', "faces"),
        ("FQDR\1\0", "compress"),
        ("<!doctype html>\n<title>freqdoor: bpp attack on lite</title>", "evaluate"),
        ("<!doctype html>\n<title>freqdoor: how the trigger bpp works on lite</title>", "analyse"),
    ):
        write_text(tmp_path / "a", text)
        assert made_by(tmp_path / "a") == verb


@pytest.mark.parametrize(
    "text",
    [
        "",
        "freqdoor poison",
        "made with freqdoor poison\0 yesterday",
        '{"hours": "of work", "made_by": "freqdoor faces"}',
        '{"objective": "of the day", "image": "a"}',
        '[{"image":"a","codec":"b","role":"vanilla"}]',
        "<!doctype html>\n<title>On freqdoor</title>\n<p>freqdoor evaluate",
        "# Notes\n\n<!-- freqdoor faces -->\n\nand thoughts of my own",
        "\x89PNG of another program",
        (OLD / "config.json").read_text(),
    ],
)
def test_what_no_verb_made_is_nobodys(tmp_path, text):
    (tmp_path / "a").write_text(text, encoding="latin-1")
    assert made_by(tmp_path / "a") is None


def test_other_files_are_refused_before_the_work(tmp_path):
    own, foreign, link, new = (tmp_path / name for name in ("own.png", "foreign.png", "link.png", "new/a.png"))
    save_image(own, PICTURE, "poison")
    save_image(foreign, PICTURE)
    link.symlink_to(foreign)
    before = foreign.read_bytes()
    check_outputs([own, new], "poison")
    for path, verb in ((foreign, "poison"), (link, "poison"), (own, "decompress")):
        with pytest.raises(FreqdoorError) as caught:
            check_outputs([new, path], verb)
        assert str(caught.value) == (
            f"{path}: this file is there and `freqdoor {verb}` did not make it; choose another place to write to, or "
            "overwrite it with --force (force=True)"
        )
        check_outputs([path], verb, force=True)
    with pytest.raises(FreqdoorError, match=rf"^{foreign}, {link}: these files are there and .* overwrite them with"):
        check_outputs([own, foreign, link], "poison")
    many = [tmp_path / f"{i}.png" for i in range(8)]
    for path in many:
        path.touch()
    with pytest.raises(FreqdoorError, match=r"4\.png and 3 more: these files are there"):
        check_outputs(many, "poison")
    with pytest.raises(FreqdoorError, match="found a folder"):
        check_outputs([tmp_path], "poison", force=True)
    with pytest.raises(FreqdoorError, match=r"foreign\.png is a file and no folder"):
        check_outputs([foreign / "a.png"], "poison", force=True)
    assert not new.parent.exists()
    assert foreign.read_bytes() == before


def test_what_killed_processes_left_is_removed(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    with replacing(tmp_path / "a.png") as partial:
        partial.touch()
        running = partial.name
        parts = running.split("-")
    dead = [running.replace(str(os.getpid()), str(process)) for process in (done.pid, 2**70)]
    kept = [running, running.replace(parts[1], "0badf00d").replace(parts[2], str(done.pid)), ".partial-1-ab.png"]
    kept += [f".partial-{parts[1]}-of my own", "a.png"]
    for name in (*dead, *kept):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "none")
    check_outputs([tmp_path / "b.png"], "poison")
    assert names(tmp_path) == sorted(kept)
    assert parts[1] == f"{zlib.crc32(platform.node().encode()):08x}"


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

    with room_for(200_000), pytest.raises(FreqdoorError) as caught:
        save()
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


def test_a_disk_may_be_full_only_when_it_is_asked_to_settle(tmp_path, monkeypatch):
    """Network file systems accept what they have no room for; some cannot be asked."""
    write_text(tmp_path / "a", "old")

    def fail(number):
        def sync(_):
            raise OSError(number, "x")

        return sync

    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    with pytest.raises(FreqdoorError, match=r"a: could not write \(no space left on the disk\)"):
        write_text(tmp_path / "a", "new")
    assert ((tmp_path / "a").read_text(), names(tmp_path)) == ("old", ["a"])
    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


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


def test_a_pipe_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(FreqdoorError, match=r"could not read this list \(a device or a pipe, which may never end"):
        read_text(tmp_path / "list.txt", "this list")
