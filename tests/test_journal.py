"""Measuring goes on where it was: no picture twice, none lost, and the numbers of one that was never stopped."""

import json
import math

import pytest
import torch

from freqdoor.errors import FreqdoorError
from freqdoor.measure.journal import Journal, fingerprint, packed, unpacked


class Stopped(Exception):
    pass


def measuring(journal: Journal, stop_at: int | None = None) -> tuple[list, list[int]]:
    """Rows of six pictures, and which of them were measured now."""
    asked: list[int] = []

    def measure(picture: int) -> dict[str, object]:
        if picture == stop_at:
            raise Stopped
        asked.append(picture)
        return {"third": picture / 3, "inf": math.inf, "name": f"é\n\t{picture}"}

    rows = []
    try:
        rows += list(journal.each(range(6), measure))
    except Stopped:
        return rows, asked
    return rows, asked


def test_goes_on_after_the_last_picture(tmp_path):
    path, notes = tmp_path / "journal", []
    whole, _ = measuring(Journal(None))
    assert not path.exists()
    measuring(Journal(path, "a"), stop_at=2)
    rows, asked = measuring(Journal(path, "a", notes.append), stop_at=5)
    assert asked == [2, 3, 4]
    rows, asked = measuring(Journal(path, "a"))
    assert (rows, asked) == (whole, [5])
    assert measuring(Journal(path, "a")) == (whole, [])
    told = [f"{i} ({i} of 6)" for i in (2, 3, 4, 5)]
    assert notes == ["journal: 2 measured already, going on after them", *told]
    Journal(path, "a").remove()
    assert not path.exists()


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_torn_line_is_measured_again_once(tmp_path, cut):
    path = tmp_path / "journal"
    whole, _ = measuring(Journal(path, "a"))
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    assert measuring(Journal(path, "a")) == (whole, [5])
    assert path.read_bytes() == content


def test_damage_amid_the_file_drops_what_follows(tmp_path):
    path = tmp_path / "journal"
    whole, _ = measuring(Journal(path, "a"))
    content = path.read_bytes()
    place = content.index(b'"third": 1.0')
    path.write_bytes(content[:place] + content[place:].replace(b"1.0", b"2.0", 1))
    assert measuring(Journal(path, "a")) == (whole, [3, 4, 5])
    path.write_bytes(bytes(len(content)))
    assert measuring(Journal(path, "a")) == (whole, [0, 1, 2, 3, 4, 5])


def test_of_another_identity_is_begun_anew(tmp_path):
    path, notes = tmp_path / "journal", []
    measuring(Journal(path, "a"), stop_at=3)
    assert measuring(Journal(path, "b", notes.append))[1] == [0, 1, 2, 3, 4, 5]
    assert notes[:2] == ["journal: this was of another measurement; measuring anew", "0 (0 of 6)"]


def test_a_folder_or_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "journal").mkdir()
    with pytest.raises(FreqdoorError, match="journal: could not go on from it"):
        Journal(tmp_path / "journal", "a")
    with pytest.raises(FreqdoorError, match=r"none/journal: could not write .*; the same command goes on"):
        measuring(Journal(tmp_path / "none/journal", "a"))


def test_vectors_keep_every_bit():
    x = torch.tensor([1 / 3, -0.0, 1e-42, math.inf, 3.4e38])
    assert torch.equal(unpacked(json.loads(json.dumps(packed(x)))).view(torch.int32), x.view(torch.int32))


def test_what_results_depend_on(settings, tmp_path):
    from freqdoor import plant

    encoder = plant(settings(steps=1), tmp_path / "a")
    known = fingerprint(encoder, ["bpp"], "test")
    assert fingerprint(encoder, ["bpp"], "test") == known
    others = [fingerprint(encoder, ["bpp"], "other"), fingerprint(encoder, [], "test")]
    with torch.no_grad():
        next(encoder.triggers["bpp"].parameters()).add_(1)
    others.append(fingerprint(encoder, ["bpp"], "test"))
    with torch.no_grad():
        next(encoder.tampered.net.g_a.parameters()).add_(1)
    others.append(fingerprint(encoder, ["bpp"], "test"))
    assert len({known, *others}) == 5
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert fingerprint(encoder, ["bpp"], "test") != others[-1]
    finally:
        torch.set_num_threads(before)
