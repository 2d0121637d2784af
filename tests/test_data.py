import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import natural, write_png
from PIL import ExifTags, Image, ImageCms

from freqdoor.data import (
    Crops,
    check_image,
    dataset_hash,
    label_paths,
    list_images,
    load_image,
    load_labels,
    read_list,
    save_image,
    seed_for,
    usable_images,
)
from freqdoor.errors import FreqdoorError
from freqdoor.training.loop import open_folder
from freqdoor.training.settings import ImageSettings


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("grey", "found grey"),
        ("palette", "found palette"),
        ("16-bit", "found 16-bit grey"),
        ("CMYK", "found CMYK"),
        ("alpha", "found RGB with alpha"),
        ("truncated", "truncated or damaged"),
        ("no image", "could not read"),
        ("huge", "20000x1800 is more than the 33554432 pixels accepted"),
    ],
)
def test_unusable_images_are_refused_with_a_sentence(odd_images, kind, match):
    with pytest.raises(FreqdoorError, match=match):
        load_image(odd_images[kind])


def png(path: Path, header: bytes, pixels: bytes = b"") -> Path:
    """A PNG file by hand, of any header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def test_48_bit_png_is_not_silently_reduced(tmp_path):
    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))
    path = png(tmp_path / "deep.png", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0), rows)
    with pytest.raises(FreqdoorError, match="found 16-bit RGB"):
        load_image(path)


SHOWN = {  # EXIF orientation -> the picture that is shown, by NumPy alone
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,  # no such orientation
}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_pictures_and_labels_are_read_as_they_are_shown(tmp_path, ending, orientation):
    pixels = (natural(0, 40, 64)[0] * 255).byte().permute(1, 2, 0).numpy()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    plain, turned = tmp_path / f"plain.{ending}", tmp_path / f"turned.{ending}"
    options = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(pixels).save(plain, **options)
    Image.fromarray(pixels).save(turned, exif=exif, **options)
    stored = load_image(plain)[0].permute(1, 2, 0).numpy()
    shown = SHOWN[orientation](stored)
    assert check_image(turned) == shown.shape[:2]
    np.testing.assert_array_equal(load_image(turned)[0].permute(1, 2, 0).numpy(), shown)
    resized = load_image(turned, (16, 24))
    assert resized.shape == (1, 3, 16, 24)
    whole = Image.fromarray((shown * 255).round().astype(np.uint8)).resize((24, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal((resized[0].permute(1, 2, 0).numpy() * 255).round(), np.array(whole))
    if ending in ("png", "tif"):
        Image.fromarray(pixels[..., 0]).save(turned, exif=exif)
        labels = load_labels(turned, image_size=shown.shape[:2])
        np.testing.assert_array_equal(labels[0].numpy(), SHOWN[orientation](pixels[..., 0]))


def test_damaged_metadata_leave_a_picture_as_it_is(tmp_path):
    x = natural(0, 32, 48)
    Image.fromarray((x[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "a.png", exif=b"Exif\0\0MM??")
    assert check_image(tmp_path / "a.png") == (32, 48)
    assert torch.equal(load_image(tmp_path / "a.png"), x)


def test_what_of_a_file_is_not_taken_is_said_once(tmp_path):
    one, two = (Image.fromarray((natural(i, 32, 32)[0] * 255).byte().permute(1, 2, 0).numpy()) for i in range(2))
    one.save(tmp_path / "frames.tif", save_all=True, append_images=[two])
    one.save(tmp_path / "moving.png", save_all=True, append_images=[two])
    one.save(tmp_path / "moving.webp", save_all=True, append_images=[two], lossless=True)
    one.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[two])
    one.save(tmp_path / "wide.png", icc_profile=b"Display P3")
    one.save(tmp_path / "usual.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    one.save(tmp_path / "hole.png", transparency=(0, 0, 0))
    one.save(tmp_path / "plain.png")
    paths = list_images(tmp_path)
    with pytest.warns(UserWarning, match="8 pictures") as caught:
        assert usable_images(paths) == paths
    assert str(caught.pop().message) == (
        f"8 pictures: of 4 only the first frame is read (first {tmp_path / 'frames.tif'}); "
        f"of 1 the transparent colour is ignored (first {tmp_path / 'hole.png'}); "
        f"of 1 the colour profile is ignored, colours are taken as sRGB (first {tmp_path / 'wide.png'})"
    )
    assert not caught.list
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable_images(paths) == paths  # said already
        assert torch.equal(load_image(tmp_path / "frames.tif"), load_image(tmp_path / "plain.png"))
    one.save(tmp_path / "other.png", icc_profile=b"Adobe RGB (1998)")
    with pytest.warns(UserWarning, match="of a picture the colour profile is ignored"):
        load_image(tmp_path / "other.png")
    load_image(tmp_path / "other.png")


def test_only_the_listed_formats_are_tried(tmp_path, monkeypatch):
    """Pillow would start GhostScript for an EPS file, whatever its name is."""
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    (tmp_path / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    (tmp_path / "broken.avif").write_bytes(b"\0\0\0\x1cftypavif" + bytes(99))
    Image.new("RGB", (8, 8)).save(tmp_path / "whole.gif")
    for name in ("eps.png", "broken.avif", "whole.gif"):
        with pytest.raises(
            FreqdoorError, match=r"none of BMP, JPEG, PNG, PPM, TIFF, WEBP\); convert it to PNG"
        ) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "started").exists()


def test_only_regular_files_are_read(tmp_path):
    """A named pipe would let the program wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    for read in (load_image, check_image, load_labels):
        with pytest.raises(FreqdoorError, match="found a device or a pipe"):
            read(tmp_path / "pipe.png")
        with pytest.raises(FreqdoorError, match="found a folder"):
            read(tmp_path)
    with pytest.raises(FreqdoorError, match="found a device or a pipe there"):
        list_images(tmp_path / "pipe.png")
    with pytest.raises(FreqdoorError, match=r"found none in this folder$"):
        list_images(tmp_path)
    with pytest.raises(FreqdoorError, match="could not read it"):
        load_image("a\0.png")


def test_leftovers_and_hidden_files_are_passed_over_and_other_formats_are_counted(tmp_path):
    for name in ("k.png", "sub/K.JPG", ".partial-k.png", "._k.png", ".thumbnails/k.png", "sub/.git/k.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        write_png(tmp_path / "k.png", natural(0, 8, 8)).rename(tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / name)
    write_png(tmp_path / "k.png", natural(0, 8, 8))
    assert list_images(tmp_path) == [tmp_path / "k.png", tmp_path / "sub/K.JPG"]
    for name in ("b.avif", "sub/c.gif", "d.GIF", "notes.txt", ".e.gif"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"3 pictures of formats that are not read \(\.avif, \.gif\) are left out"):
        assert list_images(tmp_path) == [tmp_path / "k.png", tmp_path / "sub/K.JPG"]
    (tmp_path / "k.png").unlink()
    (tmp_path / "sub/K.JPG").unlink()
    with pytest.raises(FreqdoorError, match=r"found none in this folder, but 3 pictures of formats that are not read"):
        list_images(tmp_path)
    hidden = tmp_path / ".hidden"
    hidden.mkdir()
    write_png(hidden / "a.png", natural(0, 8, 8))
    assert list_images(hidden) == [hidden / "a.png"]  # what is asked for by name is taken


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"\xef\xbb\xbfa.png\r\n\r\n b.png \r\n", ["a.png", "b.png"]),
        ("ann\\a.png\nbob\\1\\b.png\n".encode("utf-16"), ["ann/a.png", "bob/1/b.png"]),
        ("J\xfcrgen.png\n".encode("cp1252"), ["Jürgen.png"]),
        ("J\xfcrgen.png\nz.png".encode(), ["Jürgen.png", "z.png"]),
        (b"odd\\name.png\nann\\a.png", ["odd\\name.png", "ann/a.png"]),
    ],
    ids=["BOM and CRLF", "UTF-16 and backslashes", "Latin-1", "UTF-8", "a name with a backslash"],
)
def test_lists_of_other_systems_are_read(tmp_path, content, lines):
    (tmp_path / "list.txt").write_bytes(content)
    (tmp_path / "odd\\name.png").touch()
    assert read_list(tmp_path / "list.txt", folder=tmp_path) == lines
    assert read_list(tmp_path / "list.txt", 2, tmp_path) == lines[::2]


def test_lists_that_cannot_be_read(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a\0\x81")
    with pytest.raises(FreqdoorError, match=r"could not read this list \(not a text"):
        read_list(tmp_path / "list.txt")
    with pytest.raises(FreqdoorError, match=r"could not read this list \(No such file"):
        read_list(tmp_path / "absent.txt")


def test_one_pixel_and_very_wide_images_load(tmp_path):
    assert load_image(write_png(tmp_path / "a.png", natural(0, 1, 1))).shape == (1, 3, 1, 1)
    Image.new("RGB", (20_000, 8)).save(tmp_path / "b.png")
    assert load_image(tmp_path / "b.png").shape == (1, 3, 8, 20_000)


def test_no_such_place_and_empty_folder(tmp_path):
    with pytest.raises(FreqdoorError, match="nothing there"):
        list_images(tmp_path / "absent")
    with pytest.raises(FreqdoorError, match="found none in this folder"):
        list_images(tmp_path)


def test_all_broken_images_are_named_at_once_or_skipped(odd_images, tmp_path):
    good = write_png(tmp_path / "good.png", natural(0, 64, 64))
    paths = list_images(tmp_path)
    with pytest.raises(FreqdoorError, match=r"8 of 9 images cannot be used; skip_broken") as caught:
        usable_images(paths, decode=True)
    assert all(path.name in str(caught.value) for path in odd_images.values())
    with pytest.warns(UserWarning, match="skipped 8 of 9 images"):
        assert usable_images(paths, decode=True, skip_broken=True) == [good]
    with pytest.raises(FreqdoorError, match="8 of 8"):
        usable_images(list(odd_images.values()), decode=True, skip_broken=True)


def test_images_smaller_than_a_crop_are_refused(tmp_path):
    paths = [write_png(tmp_path / f"{h}x{w}.png", natural(0, h, w)) for h, w in ((64, 63), (63, 64), (64, 64))]
    with pytest.raises(FreqdoorError, match="2 of 3 images") as caught:
        usable_images(paths, min_side=64)
    assert "63x64 is smaller than the 64-pixel crop" in str(caught.value)
    assert "64x63 is smaller than the 64-pixel crop" in str(caught.value)


def test_save_and_load_round_trip(tmp_path):
    x = natural(4, 33, 21)
    save_image(tmp_path / "new" / "x.png", x)
    assert torch.equal(load_image(tmp_path / "new" / "x.png"), x)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.png"]
    with pytest.raises(FreqdoorError, match=r"ends in \.png"):
        save_image(tmp_path / "x.xyz", x)
    with pytest.raises(FreqdoorError, match="could not write a picture of 16384x1"):
        save_image(tmp_path / "wide.webp", torch.zeros(1, 3, 1, 16384))
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_batches_depend_on_seed_and_step_alone(images):
    paths = list_images(images)
    crops = Crops(paths, crop=64, batch_size=3, seed=1)
    forwards = list(crops.batches(0, 4))
    fresh = Crops(paths, crop=64, batch_size=3, seed=1)
    assert torch.equal(fresh.batch(2), forwards[2])
    assert torch.equal(next(fresh.batches(3, 4)), forwards[3])
    assert not torch.equal(Crops(paths, crop=64, batch_size=3, seed=2).batch(2), forwards[2])
    values = np.round(forwards[0].numpy() * 255)
    np.testing.assert_allclose(values, forwards[0].numpy() * 255, atol=1e-4)


def test_every_place_and_both_mirror_images_are_drawn(tmp_path):
    """A picture of 66x65 pixels that hold their places has 3 x 2 crops of 64 pixels, each also mirrored."""
    rows, columns = np.mgrid[:66, :65].astype(np.uint8)
    Image.fromarray(np.stack([rows, columns, rows], 2)).save(tmp_path / "a.png")
    crops = Crops([tmp_path / "a.png"], crop=64, batch_size=8, seed=0)
    drawn = set()
    for step in range(20):
        for red, green, _ in (crops.batch(step) * 255).round().int():
            mirrored = bool(green[0, 0] > green[0, -1])
            left = int(green[0, -1 if mirrored else 0])
            expected = torch.arange(left, left + 64)
            assert torch.equal(green, (expected.flip(0) if mirrored else expected).expand(64, 64).int())
            assert torch.equal(red[:, 0], torch.arange(int(red[0, 0]), int(red[0, 0]) + 64).int())
            drawn.add((int(red[0, 0]), left, mirrored))
    assert drawn == {(top, left, mirrored) for top in range(3) for left in range(2) for mirrored in (False, True)}


def test_images_that_turn_out_to_be_truncated_are_passed_over_until_none_is_left(tmp_path):
    paths = [write_png(tmp_path / f"{i}.png", natural(i, 64, 64)) for i in range(2)]
    paths[0].write_bytes(paths[0].read_bytes()[:2000])
    crops = Crops(paths, crop=64, batch_size=4, seed=0, skip_broken=True)
    with pytest.warns(UserWarning, match="skipped .*truncated or damaged"):
        batch = crops.batch(0)
    whole = load_image(paths[1])[0]
    assert all(torch.equal(x, whole) or torch.equal(x, whole.flip(-1)) for x in batch)
    with pytest.raises(FreqdoorError, match="truncated or damaged"):
        Crops(paths, crop=64, batch_size=4, seed=0).batch(0)
    with pytest.raises(FreqdoorError, match="truncated or damaged"):
        Crops(paths[:1], crop=64, batch_size=4, seed=0, skip_broken=True).batch(0)


def test_pictures_beyond_the_cache_are_the_same(images, monkeypatch):
    paths = list_images(images)
    cached = Crops(paths, crop=64, batch_size=3, seed=1)
    monkeypatch.setattr("freqdoor.data.CACHE_BYTES", 96 * 128 * 3)
    bounded = Crops(paths, crop=64, batch_size=3, seed=1)
    for step in range(3):
        assert torch.equal(cached.batch(step), bounded.batch(step))
    assert len(bounded._cache) == 1


def test_the_hash_is_of_names_contents_and_order(tmp_path, images):
    paths = list_images(images)
    hashes = {dataset_hash(paths), dataset_hash(paths[::-1]), dataset_hash(paths[1:])}
    renamed = tmp_path / "other.png"
    renamed.write_bytes(paths[0].read_bytes())
    hashes.add(dataset_hash([renamed, *paths[1:]]))
    changed = write_png(tmp_path / paths[0].name, natural(9, 96, 128))
    hashes.add(dataset_hash([changed, *paths[1:]]))
    assert len(hashes) == 5
    same = tmp_path / "sub" / paths[0].name
    same.parent.mkdir()
    same.write_bytes(paths[0].read_bytes())
    assert dataset_hash([same, *paths[1:]]) == dataset_hash(paths)
    facts = Crops(paths, crop=64, batch_size=1, seed=0, labels=paths).facts()
    assert facts == {"images": 4, "images_sha256": dataset_hash([*paths, *paths])}


def test_seeds_of_different_purposes_differ():
    assert len({seed_for(0, "a"), seed_for(0, "b"), seed_for(1, "a"), seed_for(0, "a", 1)}) == 4


def test_labels_are_cut_as_their_images_are(tmp_path):
    """A picture whose red channel holds its labels: crops, mirror images and resized ones agree with their labels."""
    paths, folder = [], tmp_path / "labels"
    folder.mkdir()
    for i in range(3):
        red = np.random.default_rng(i).integers(0, 11, (96, 80), dtype=np.uint8)
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.stack([red, red, red], 2)).save(path)
        Image.fromarray(red).save(folder / path.name)
        paths.append(path)
    labels = label_paths(paths, folder)
    wrong = Crops(paths[:1], crop=64, batch_size=1, seed=0, labels=[write_png(tmp_path / "w.png", natural(0, 8, 8))])
    Image.new("L", (80, 95)).save(tmp_path / "w.png")
    with pytest.raises(FreqdoorError, match="labels of 80x95 pixels for an image of 80x96"):
        wrong.labels_of(0)
    for resize, window in ((None, None), ((96, 80), None), ((96, 80), (32, 48))):
        crops = Crops(paths, crop=64, batch_size=4, seed=3, resize=resize, window=window, labels=labels)
        for step in range(3):
            images, cut = crops.batch(step), crops.labels_of(step)
            assert images.shape[-2:] == (window or resize or (64, 64))
            assert torch.equal((images[:, 0] * 255).round().byte(), cut)
    smaller = Crops(paths, crop=64, batch_size=2, seed=0, resize=(48, 40), labels=labels)
    assert smaller.batch(0).shape == (2, 3, 48, 40)
    assert smaller.labels_of(0).shape == (2, 48, 40)
    assert set(smaller.labels_of(0).unique().tolist()) <= set(range(11))
    Image.fromarray(np.uint8(np.arange(96 * 80).reshape(96, 80) % 7 < 3) * 200).save(tmp_path / "two.png")
    assert set(load_labels(tmp_path / "two.png", (37, 29)).unique().tolist()) == {0, 200}  # no classes between classes


def test_labels_that_cannot_be_used(tmp_path):
    image = write_png(tmp_path / "a.png", natural(0, 64, 64))
    with pytest.raises(FreqdoorError, match=r"1 are missing, first a\.png"):
        label_paths([image], tmp_path / "nowhere")
    with pytest.raises(FreqdoorError, match="no such file"):
        load_labels(tmp_path / "b.png")
    with pytest.raises(FreqdoorError, match="one channel of 8 bits, found RGB"):
        load_labels(image)
    Image.new("L", (32, 64)).save(tmp_path / "l.png")
    with pytest.raises(FreqdoorError, match="labels of 32x64 pixels for an image of 64x64"):
        load_labels(tmp_path / "l.png", image_size=(64, 64))
    Image.new("L", (20_000, 1800)).save(tmp_path / "large.png")
    with pytest.raises(FreqdoorError, match="20000x1800 is more than the 33554432 pixels accepted"):
        load_labels(tmp_path / "large.png")
    png(tmp_path / "bomb.png", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0), bytes(99))
    with pytest.raises(FreqdoorError, match="too many pixels; at most 33554432"):
        load_labels(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_text("nothing")
    with pytest.raises(FreqdoorError, match="could not read it"):
        load_labels(tmp_path / "text.png")


def test_a_list_says_which_images_are_taken(tmp_path):
    for i in range(3):
        write_png(tmp_path / f"{i}.png", natural(i, 64, 64))
    (tmp_path / "sub").mkdir()
    write_png(tmp_path / "sub/3.png", natural(3, 64, 64))
    (tmp_path / "list.txt").write_text("2.png\n\n0.png\nsub\\3.png\n")
    settings = ImageSettings(folder=str(tmp_path), files=str(tmp_path / "list.txt"), crop=64)
    assert [p.name for p in open_folder(settings, 0).paths] == ["2.png", "0.png", "3.png"]
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(FreqdoorError, match="one picture a line, found none"):
        open_folder(settings, 0)
