import numpy as np
import pytest
import torch
from conftest import natural, write_png
from PIL import Image

from freqdoor.data import Crops, label_paths, list_images, load_image, load_labels, save_image, seed_for, usable_images
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
        ("huge", "20000x900 is more than the 16777216 pixels accepted"),
    ],
)
def test_unusable_images_are_refused_with_a_sentence(odd_images, kind, match):
    with pytest.raises(FreqdoorError, match=match):
        load_image(odd_images[kind])


def test_48_bit_png_is_not_silently_reduced(tmp_path):
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    path = tmp_path / "deep.png"
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(FreqdoorError, match="found 16-bit RGB"):
        load_image(path)


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


def test_save_and_load_round_trip(tmp_path):
    x = natural(4, 33, 21)
    save_image(tmp_path / "new" / "x.png", x)
    assert torch.equal(load_image(tmp_path / "new" / "x.png"), x)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.png"]
    with pytest.raises(FreqdoorError, match=r"ends in \.png"):
        save_image(tmp_path / "x.xyz", x)


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
    for resize, window in ((None, None), ((96, 80), None), ((96, 80), (32, 48))):
        crops = Crops(paths, crop=64, batch_size=4, seed=3, resize=resize, window=window, labels=labels)
        for step in range(3):
            images, cut = crops.batch(step), crops.labels_of(step)
            assert images.shape[-2:] == (window or resize or (64, 64))
            assert torch.equal((images[:, 0] * 255).round().byte(), cut)
    smaller = Crops(paths, crop=64, batch_size=2, seed=0, resize=(48, 40), labels=labels)
    assert smaller.batch(0).shape == (2, 3, 48, 40)
    assert smaller.labels_of(0).shape == (2, 48, 40)
    assert set(smaller.labels_of(0).unique().tolist()) <= set(range(11))  # nearest: no classes between classes


def test_labels_that_cannot_be_used(tmp_path):
    image = write_png(tmp_path / "a.png", natural(0, 64, 64))
    with pytest.raises(FreqdoorError, match=r"1 are missing, first a\.png"):
        label_paths([image], tmp_path / "nowhere")
    with pytest.raises(FreqdoorError, match="found no such file"):
        load_labels(tmp_path / "b.png")
    with pytest.raises(FreqdoorError, match="one channel of 8 bits, found RGB"):
        load_labels(image)
    Image.new("L", (32, 64)).save(tmp_path / "l.png")
    with pytest.raises(FreqdoorError, match="labels of 32x64 pixels for an image of 64x64"):
        load_labels(tmp_path / "l.png", image_size=(64, 64))
    (tmp_path / "text.png").write_text("nothing")
    with pytest.raises(FreqdoorError, match="could not read it"):
        load_labels(tmp_path / "text.png")


def test_a_list_says_which_images_are_taken(tmp_path):
    for i in range(3):
        write_png(tmp_path / f"{i}.png", natural(i, 64, 64))
    (tmp_path / "list.txt").write_text("2.png\n\n0.png\n")
    settings = ImageSettings(folder=str(tmp_path), files=str(tmp_path / "list.txt"), crop=64)
    assert [p.name for p in open_folder(settings, 0).paths] == ["2.png", "0.png"]
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(FreqdoorError, match="one picture a line, found none"):
        open_folder(settings, 0)
