"""Pictures in Arrow files: the batches of a folder, and one sentence for whatever else such a file holds."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

from freqdoor.arrow import list_arrow, pictures_in
from freqdoor.data import Crops, list_images, list_training_images, load_image
from freqdoor.errors import FreqdoorError
from freqdoor.training.loop import open_folder
from freqdoor.training.settings import ImageSettings

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'freqdoor[datasets]'")
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def saved(folder: Path, columns: dict, *, batch: int = 2, compression: str | None = None) -> Path:
    """A set as datasets saves it; the Arrow file."""
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    table, path = pa.table(columns), folder / "data-00000-of-00001.arrow"
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(str(path), table.schema, options=options) as stream:
        stream.write_table(table, max_chunksize=batch)
    return path


def rows(images: Path) -> list[dict]:
    return [{"bytes": path.read_bytes(), "path": path.name} for path in list_images(images)]


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_sets_that_the_library_saves_give_the_batches_of_the_folder(images, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in list_images(images)]
    whole = datasets.Dataset.from_dict({"image": files, "label": [0, 1, 2, 3]}).cast_column("image", datasets.Image())
    whole.save_to_disk(tmp_path / "set", num_shards=2)
    assert len(list_arrow(tmp_path / "set")) == 2
    of_set = open_folder(ImageSettings(folder=str(tmp_path / "set"), crop=64, batch_size=5), 3)
    of_folder = Crops(list_images(images), crop=64, batch_size=5, seed=3)
    for step in (0, 7):
        assert torch.equal(of_set.batch(step), of_folder.batch(step))
    whole.select([3, 1]).save_to_disk(tmp_path / "part")
    first = list_training_images(tmp_path / "part")[0]
    assert torch.equal(load_image(first), load_image(files[3]))
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "both")
    with pytest.raises(FreqdoorError, match="found the splits train, test; name one"):
        list_training_images(tmp_path / "both")
    assert len(list_training_images(tmp_path / "both/test")) == 4


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_pictures_are_where_they_are_said_to_be(images, tmp_path, kind):
    content = rows(images)
    content[2]["path"] = None
    content[3]["path"] = "../../e\\vil.png"
    column = pa.array(content, pa.struct([("bytes", kind), ("path", pa.string())]))
    found = pictures_in(saved(tmp_path, {"text": ["a", "b", "c", "d"], "photo": column}, batch=3))
    assert [picture.read_bytes() for picture in found] == [row["bytes"] for row in content]
    assert [picture.inside for picture in found] == ["0/0.png", "1/1.png", "2", "3/e\\vil.png"]


def test_what_names_arrow_files(images, tmp_path):
    assert list_arrow(images) == []
    file = saved(tmp_path / "set", {"image": pa.array(rows(images), PICTURE)})
    assert list_arrow(file) == list_arrow(tmp_path / "set") == [file]
    settings = ImageSettings(folder=str(tmp_path / "set"), files="list.txt")
    with pytest.raises(FreqdoorError, match="files: a list names pictures in a folder"):
        open_folder(settings, 0)
    saved(tmp_path / "set", {"image": pa.array([], PICTURE)})
    with pytest.raises(FreqdoorError, match="found none"):
        list_training_images(tmp_path / "set")


def test_of_several_columns_of_pictures_one_is_called_image(images, tmp_path):
    column = pa.array(rows(images), PICTURE)
    assert len(pictures_in(saved(tmp_path, {"mask": column, "image": column}))) == 4
    with pytest.raises(FreqdoorError, match="one called image, found a, b"):
        pictures_in(saved(tmp_path, {"a": column, "b": column}))
    with pytest.raises(FreqdoorError, match="found none"):
        pictures_in(saved(tmp_path, {"a": [1], "b": pa.array([b"x"])}))


def test_other_files_end_in_one_sentence(images, tmp_path):
    column = pa.array(rows(images), PICTURE)
    with pytest.raises(FreqdoorError, match=r"uncompressed and whole \(its parts are compressed\)"):
        pictures_in(saved(tmp_path, {"image": column}, compression="zstd"))
    for missing in ({"bytes": None, "path": "a.png"}, None):
        with pytest.raises(FreqdoorError, match="found rows without"):
            pictures_in(saved(tmp_path, {"image": pa.array([*rows(images), missing], PICTURE)}))
    content = saved(tmp_path, {"image": column}).read_bytes()
    file = tmp_path / "x.arrow"
    for broken in (b"", b"ARROW1\0\0" + bytes(100), content[:500], content[: len(content) // 2], b"\xff" * 4096):
        file.write_bytes(broken)
        with pytest.raises(FreqdoorError, match="expected an Arrow file of pictures"):
            pictures_in(file)


def test_damage_is_a_sentence_or_no_picture_outside_the_file(images, tmp_path):
    """Every byte of the tables, turned over: what is still read lies in the file."""
    content = saved(tmp_path, {"image": pa.array(rows(images)[:1], PICTURE)}).read_bytes()
    start = content.index(b"\x89PNG")
    file, read = tmp_path / "x.arrow", 0
    for place in range(0, start, 3):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        found = []
        with contextlib.suppress(FreqdoorError):
            found = pictures_in(file)
        read += len(found)
        assert all(0 <= row.offset <= row.offset + row.size <= len(content) for row in found)
    assert read
