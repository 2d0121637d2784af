"""The paper's data sets, on tiny folders laid out as the real ones, and its configs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import natural, write_png
from PIL import Image

from freqdoor.attack.settings import PlantSettings
from freqdoor.data import label_paths, load_labels
from freqdoor.errors import FreqdoorError
from freqdoor.measure.faces import Pair, read_lists
from freqdoor.measure.testsets import FaceTest, SegmentationTest
from freqdoor.paper.recipe import Material, recipe_for
from freqdoor.settings import load_settings, merge
from freqdoor.training.loop import open_folder
from freqdoor.training.settings import CodecTraining, ImageSettings

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs/paper").glob("*.toml"))
CITYSCAPES = {  # cityscapesscripts.helpers.labels: name -> id, train id
    **{name: (i, 255) for i, name in enumerate(("unlabeled", "ego vehicle", "rectification border", "out of roi"))},
    **{"static": (4, 255), "dynamic": (5, 255), "ground": (6, 255), "road": (7, 0), "sidewalk": (8, 1)},
    **{"parking": (9, 255), "rail track": (10, 255), "building": (11, 2), "wall": (12, 3), "fence": (13, 4)},
    **{"guard rail": (14, 255), "bridge": (15, 255), "tunnel": (16, 255), "pole": (17, 5), "polegroup": (18, 255)},
    **{"traffic light": (19, 6), "traffic sign": (20, 7), "vegetation": (21, 8), "terrain": (22, 9), "sky": (23, 10)},
    **{"person": (24, 11), "rider": (25, 12), "car": (26, 13), "truck": (27, 14), "bus": (28, 15)},
    **{"caravan": (29, 255), "trailer": (30, 255), "train": (31, 16), "motorcycle": (32, 17), "bicycle": (33, 18)},
}


def picture(path: Path, seed: int = 0, height: int = 64, width: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_png(path, natural(seed, height, width))


@pytest.mark.parametrize(("frames", "name"), [(3, "tri_trainlist.txt"), (7, "sep_trainlist.txt")])
def test_vimeo90k_by_its_list_of_folders(tmp_path, frames, name):
    for i, folder in enumerate(("00001/0001", "00001/0002", "00002/0001")):
        for frame in range(1, frames + 1):
            picture(tmp_path / f"sequences/{folder}/im{frame}.png", 10 * i + frame)
    (tmp_path / name).write_text("00002/0001\n00001/0001\n")
    settings = ImageSettings(folder=str(tmp_path / "sequences"), files=str(tmp_path / name), crop=64)
    paths = [str(path.relative_to(tmp_path / "sequences")) for path in open_folder(settings, 0).paths]
    assert paths == [f"{folder}/im{i}.png" for folder in ("00002/0001", "00001/0001") for i in range(1, frames + 1)]
    (tmp_path / name).write_text("00001/0009\n")
    with pytest.raises(FreqdoorError, match="00001/0009: expected an image"):
        open_folder(settings, 0)


def test_imagenet_has_grey_and_small_pictures_that_can_be_left_out(tmp_path):
    train = tmp_path / "ILSVRC/Data/CLS-LOC/train"
    names = ("n01440764/n01440764_10026.JPEG", "n02102040/n02102040_7.JPEG", "n02102040/n02102040_8.JPEG")
    for i, name in enumerate(names):
        path = picture((train / name).with_suffix(".png"), i, 64, 96)
        Image.open(path).convert("L" if i == 2 else "RGB").save(train / name)
        path.unlink()
    Image.new("RGB", (32, 32)).save(train / "n02102040/n02102040_9.JPEG")
    settings = ImageSettings(folder=str(train), crop=64)
    with pytest.raises(FreqdoorError, match="2 of 4 images cannot be used; skip_broken"):
        open_folder(settings, 0)
    with pytest.warns(UserWarning, match="skipped 2 of 4 images"):
        crops = open_folder(settings.model_copy(update={"skip_broken": True}), 0)
    assert [path.name for path in crops.paths] == ["n01440764_10026.JPEG", "n02102040_7.JPEG"]
    (tmp_path / "list.txt").write_text("n02102040/n02102040_7.JPEG\n")
    listed = settings.model_copy(update={"files": str(tmp_path / "list.txt")})
    assert [path.name for path in open_folder(listed, 0).paths] == ["n02102040_7.JPEG"]


def test_ffhq_is_a_folder_of_folders(tmp_path):
    for number in (0, 999, 1000):
        picture(tmp_path / f"images1024x1024/{number // 1000:02d}000/{number:05d}.png", number)
    settings = ImageSettings(folder=str(tmp_path / "images1024x1024"), resize=(32, 32), batch_size=2)
    crops = open_folder(settings, 0)
    assert [path.name for path in crops.paths] == ["00000.png", "00999.png", "01000.png"]
    assert crops.batch(0).shape == (2, 3, 32, 32)


@pytest.fixture
def cityscapes(tmp_path):
    """Two pictures whose red channel holds their label ids, and other files that stand beside the labels."""
    ids = np.random.default_rng(0).permutation(np.arange(64 * 96) % 34).astype(np.uint8).reshape(64, 96)
    for i, (city, scene) in enumerate((("aachen", "aachen_000000_000019"), ("bad-honnef", "bad-honnef_000000_000000"))):
        labels = tmp_path / f"gtFine/train/{city}"
        images = tmp_path / f"leftImg8bit/train/{city}"
        labels.mkdir(parents=True)
        images.mkdir(parents=True)
        own = np.roll(ids, i)
        Image.fromarray(np.stack([own, own, own], 2)).save(images / f"{scene}_leftImg8bit.png")
        Image.fromarray(own).save(labels / f"{scene}_gtFine_labelIds.png")
        Image.fromarray(own * 7).save(labels / f"{scene}_gtFine_instanceIds.png")
        (labels / f"{scene}_gtFine_polygons.json").write_text("{}")
    return tmp_path


def test_cityscapes_label_ids_are_train_ids_where_they_lie(cityscapes):
    settings = ImageSettings(
        folder=str(cityscapes / "leftImg8bit/train"), labels=str(cityscapes / "gtFine/train"), crop=64, batch_size=3
    )
    crops = open_folder(settings, 0)
    assert [path.name for path in crops.labels] == [
        "aachen_000000_000019_gtFine_labelIds.png",
        "bad-honnef_000000_000000_gtFine_labelIds.png",
    ]
    table = torch.full((34,), 99)
    for number, train in CITYSCAPES.values():
        table[number] = train
    assert 99 not in table
    for step in range(2):
        ids = (255 * crops.batch(step)[:, 0]).round().long()
        assert torch.equal(crops.labels_of(step).long(), table[ids])
    raw = load_labels(crops.labels[0])
    assert (raw.dtype, raw.shape) == (torch.uint8, (1, 64, 96))
    plain = crops.labels[0].rename(cityscapes / "same.png")
    assert int(load_labels(plain).max()) == 33  # of other sets a value is a class


def test_a_missing_label_of_cityscapes_is_named(cityscapes):
    [image, _] = sorted((cityscapes / "leftImg8bit").rglob("*.png"))
    (cityscapes / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(FreqdoorError, match=r"1 are missing, first aachen_000000_000019_gtFine_labelIds\.png"):
        label_paths([image], cityscapes / "gtFine/train")


def celeba(folder: Path, persons: dict[str, int]) -> FaceTest:
    """CelebA's identity file: persons are numbers, and how many pictures each has."""
    owners = [person for person, count in persons.items() for _ in range(count)]
    lines = [f"{i + 1:06d}.jpg {owner}\n" for i, owner in enumerate(owners)]
    np.random.default_rng(0).shuffle(lines)
    (folder / "identity_CelebA.txt").write_text("".join(lines))
    return FaceTest(
        folder=str(folder / "img_align_celeba"),
        identities=str(folder / "identity_CelebA.txt"),
        sample=3,
        networks=("face.toml",),
    )


def test_celeba_persons_are_drawn_from_its_identity_file(tmp_path):
    test = celeba(tmp_path, {"2880": 4, "7": 2, "12": 3, "9000": 5, "1": 1, "44": 3})
    lists = read_lists(test)
    assert len(set(lists.persons)) == 3 == len(lists.probes) == len(set(lists.probes))
    assert not {"7", "1"} & set(lists.persons)  # who have too few pictures
    assert [lists.person(path) for path in lists.gallery[::2]] == [lists.person(path) for path in lists.probes]
    assert len(set(lists.pictures)) == 9 == len(lists.gallery) + len(lists.probes)
    same, others = lists.pairs[:3], lists.pairs[3:]
    assert all(pair.same and lists.person(pair.a) == lists.person(pair.b) for pair in same)
    assert not any(pair.same or lists.person(pair.a) == lists.person(pair.b) for pair in others)
    assert {pair.b for pair in lists.pairs} == set(lists.probes)
    assert read_lists(test) == lists
    with pytest.raises(FreqdoorError, match=r"identity_CelebA.txt: expected 5 persons .* found 4; give a smaller"):
        read_lists(test.model_copy(update={"sample": 5}))
    (tmp_path / "identity_CelebA.txt").write_text("000001.jpg\n")
    with pytest.raises(FreqdoorError, match=r"expected 'PATH PERSON' a line, found '000001\.jpg'"):
        read_lists(test)


def test_lists_beside_an_identity_file(tmp_path):
    test = celeba(tmp_path, {"2880": 2, "7": 1})
    (tmp_path / "gallery.txt").write_text("000001.jpg\n000003.jpg\n")
    (tmp_path / "probes.txt").write_text("000002.jpg\n")
    (tmp_path / "pairs.txt").write_text("000001.jpg 000002.jpg 1\n")
    named = {key: str(tmp_path / f"{key}.txt") for key in ("gallery", "probes", "pairs")}
    lists = read_lists(FaceTest(**test.model_dump(exclude={"sample", *named}) | named))
    assert (lists.persons, lists.person("000002.jpg")) == (["2880", "7"], "2880")
    assert lists.pairs == [Pair("000001.jpg", "000002.jpg", True)]
    for wrong in ({"sample": 3, "gallery": "g.txt"}, {"identities": None, "sample": 3}, {"sample": None}):
        with pytest.raises(ValueError, match="expected"):
            FaceTest(**test.model_dump() | wrong)


def kind_of(path: Path) -> type:
    kinds = {"cityscapes-test": SegmentationTest, "celeba-test": FaceTest}
    return kinds.get(path.stem, CodecTraining if path.stem.startswith("vanilla") else PlantSettings)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_the_paper_is_read_and_documented(path):
    settings = load_settings(kind_of(path), path)
    assert f"configs/paper/{path.name}" in path.read_text()
    assert f"configs/paper/{path.name}" in (ROOT / "docs/datasets.md").read_text()
    specs = set(re.findall(r"configs/networks/[\w-]+\.toml", path.read_text()))
    assert all((ROOT / spec).is_file() for spec in specs)
    if isinstance(settings, PlantSettings):
        assert (settings.preset, settings.images.crop, settings.images.batch_size) == ("paper", 256, 32)
        assert settings.codec.weights == f"runs/paper/vanilla-{settings.codec.name.replace(':', '-')}/codec.safetensors"
    if isinstance(settings, CodecTraining):
        epoch = -(-153_939 // 32)  # steps
        assert (settings.steps, settings.validate_every, settings.patience) == (100 * epoch, epoch, 10)


@pytest.mark.parametrize(
    ("recipe", "row", "name"),
    [
        ("table4", "with Eq. (4)", "table4-eq4"),
        ("table4", "without top-K", "table4-no-topk"),
        ("table4", "without patch weight", "table4-no-patch-weight"),
        ("table4", "K=4, N=16", "table4-k4-n16"),
        ("table4", "K=64, N=256", "table4-k64-n256"),
        ("table4", "ours (K=16, N=64)", "table4-ours"),
        ("table5", "ours", "table5-ours"),
        ("table6", "ours", "table5-ours"),
    ],
)
def test_a_config_is_the_recipes_row(recipe, row, name):
    """The same objective and trigger, at the paper's preset."""
    config = load_settings(PlantSettings, ROOT / f"configs/paper/{name}.toml")
    [changes] = [r.changes for r in recipe_for(recipe, Material()).rows if r.name == row]
    base = {"preset": "paper", "images": {"folder": "x"}}
    [theirs], [ours] = PlantSettings.model_validate(merge(base, changes)).planned, config.planned
    assert (ours.objective, ours.trigger) == (theirs.objective, theirs.trigger)
