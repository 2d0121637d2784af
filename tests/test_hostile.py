"""What a stranger sends ends in the same picture or in a sentence; the makers are those of tools/fuzz.py."""

import contextlib
import signal
import unicodedata
import warnings
from pathlib import Path

import hostile
import pytest
import running
import torch
from conftest import natural
from factories import tiny
from fuzz import judged, same_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import differences, timeless
from running import Ended

from freqdoor.attack.networks import NetworkSpec
from freqdoor.attack.settings import PlantSettings
from freqdoor.cli.terminal import HIDDEN, harmless
from freqdoor.codecs.container import pack, unpack
from freqdoor.codecs.loading import load_codec, save_codec
from freqdoor.data import load_image, read_list
from freqdoor.errors import FreqdoorError
from freqdoor.measure.testsets import FaceTest
from freqdoor.settings import load_settings

pytestmark = pytest.mark.whole
RANDOM = st.randoms(use_true_random=False)


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def denormal_numbers():
    """hypothesis draws them; commands that ran in this process before take them for zero."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def pictures(folder) -> tuple[Path, ...]:
    return hostile.make_pictures(folder / "pictures")


@pytest.fixture(scope="module")
def coded():
    """A codec, a bitstream as a file has it, and the picture in it."""
    codec = tiny("lite-hyperprior")
    bitstream = codec.compress(natural(3, 70, 90))[0]
    return codec, pack(bitstream, codec), codec.decompress(bitstream)


def test_a_changed_bitstream_is_refused_or_the_same_picture(coded):
    codec, content, expected = coded

    @examples(150)
    @given(RANDOM)
    def check(random):
        changed = hostile.bitstream(random, content)
        with contextlib.suppress(FreqdoorError):
            assert torch.equal(codec.decompress(unpack(changed, codec)), expected)

    check()


def test_a_changed_codec_is_refused_or_decodes_the_same_picture(coded, folder):
    codec, content, expected = coded
    source, path = folder / "good.safetensors", folder / "codec.safetensors"
    save_codec(codec, source)
    state = folder / "good.pth"
    torch.save(codec.net.state_dict(), state)

    @examples(30)
    @given(RANDOM, st.booleans())
    def check(random, plain):
        path.unlink(missing_ok=True)
        if plain:
            hostile.pickled(random, state, path.with_suffix(".pth"))
        else:
            hostile.safetensors(random, source, path)
        with contextlib.suppress(FreqdoorError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tables that are older than the weights are a warning
            other = load_codec(str(path.with_suffix(".pth") if plain else path))
            assert torch.equal(other.decompress(unpack(content, other)), expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACES", str(folder / "traces"))
        patch.chdir(folder)
        check()
    assert not (folder / "traces").exists()
    assert not (folder / "ran").exists()


def test_a_changed_picture_is_a_picture_or_a_sentence(pictures, folder):
    @pytest.mark.filterwarnings("ignore")
    @examples(150)
    @given(RANDOM)
    def check(random):
        source = hostile.one_of(random, pictures)
        content = source.read_bytes()
        png = content.startswith(b"\x89PNG") and random.random() < 0.5
        path = folder / f"picture{source.suffix}"
        path.write_bytes(hostile.png(random, content) if png else hostile.damaged(random, content))
        with contextlib.suppress(FreqdoorError, UserWarning):
            x = load_image(path)
            assert x.shape[:2] == (1, 3)
            assert 0 <= x.min() <= x.max() <= 1

    check()


@pytest.mark.parametrize("kind", [PlantSettings, FaceTest, NetworkSpec])
def test_changed_settings_are_settings_or_a_sentence(kind, folder):
    trees = {
        PlantSettings: {"codec": "a:3", "images": {"folder": "x", "crop": 64}, "trigger": {"eps": 0.1}, "attacks": []},
        FaceTest: {"folder": "a", "gallery": "b", "probes": "c", "networks": ["d"], "every": 2},
        NetworkSpec: {"task": "segmentation", "classes": ["a", "b"], "labels": [["a"]], "size": [64, 64], "crop": []},
    }
    path = folder / "settings.toml"

    @examples(60)
    @given(RANDOM)
    def check(random):
        path.write_bytes(hostile.settings_text(random, trees[kind]))
        with contextlib.suppress(FreqdoorError):
            assert isinstance(load_settings(kind, path), kind)

    check()


@examples(60)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_list_or_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "list.txt"
    path.write_bytes(content)
    with contextlib.suppress(FreqdoorError):
        assert all(line.strip() and "\0" not in line for line in read_list(path))


@examples(100)
@given(st.text(max_size=40))
def test_any_text_is_harmless(text):
    shown = harmless(text)
    assert not any(unicodedata.category(c) in HIDDEN for c in shown.replace("\n  ", ""))
    assert harmless(shown) == shown
    assert text.isprintable() <= (shown == text)


GOOD = Ended(0, None, 1.0, 10, "", "", "")


@pytest.mark.parametrize(
    ("done", "fault"),
    [
        (GOOD, ""),
        (GOOD._replace(code=2, err="note: a\nfreqdoor: no such file\n"), ""),
        (GOOD._replace(code=2, err="Usage: freqdoor\n"), ""),
        (GOOD._replace(code=2, err=""), "code 2 with 0 sentences"),
        (GOOD._replace(code=2, err="freqdoor: a\nfreqdoor: b\n"), "code 2 with 2 sentences"),
        (GOOD._replace(code=1, err="freqdoor: a\n"), "code 1 with 1 sentences"),
        (GOOD._replace(code=2, err="Traceback (most recent call last)\nfreqdoor: a\n"), "traceback"),
        (GOOD._replace(code=None, signal=signal.SIGSEGV), "signal SIGSEGV"),
        (GOOD._replace(code=None, signal=signal.SIGPROF), "hang"),
        (GOOD._replace(code=None, signal=signal.SIGALRM), "hang"),
        (GOOD._replace(megabytes=10**6), "memory"),
        (GOOD._replace(code=2, err="freqdoor: out of memory\n"), "memory"),
        (GOOD._replace(traces="gs -q\n"), "program started"),
        (GOOD._replace(traces="socket.connect ()\n"), "network"),
    ],
)
def test_what_counts_as_a_fault(done, fault):
    assert done.fault == fault


def test_what_a_command_leaves_is_looked_at(tmp_path, pictures):
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "tmp").mkdir()
    case = hostile.Case(("decompress",), pictures[0])
    failed = GOOD._replace(code=2, err="freqdoor: damaged\n")
    (work / "out.png").write_bytes(pictures[0].read_bytes())
    assert judged(case, GOOD, tmp_path) == ""
    assert judged(case, failed, tmp_path) == "half-written file"
    hostile.picture(5, *hostile.SMALL).save(work / "out.png")
    assert judged(case, GOOD, tmp_path) == "wrong picture"
    (work / ".partial-1-a.png").touch()
    assert judged(case, GOOD, tmp_path) == "temporary files left"
    (work / "ran").touch()
    assert judged(case, GOOD, tmp_path) == "code of a file ran"
    assert not same_picture(work / "out.png", pictures[0])


def test_results_are_compared_but_for_what_clocks_say():
    one = {"a.json": timeless({"psnr": 3.0, "encode_seconds": 1, "deep": [{"started": 5, "step": 1}]})}
    assert one == {"a.json": {"psnr": 3.0, "deep": [{"step": 1}]}}
    assert differences(one, {"a.json": one["a.json"], "b.md": []}) == ["b.md"]
    assert differences(one, {"a.json": {}}) == ["a.json"]
    assert differences(one, dict(one)) == []


def test_a_new_table_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    page = tmp_path / "security.md"
    page.write_text("before\n<!-- kills -->\nold\n<!-- end of kills -->\nafter\n")
    monkeypatch.setattr(running, "PAGE", page)
    for table in ("first", "second"):
        running.write("kills", table, {"runs": 1}, tmp_path / "kills.json", page=True)
    assert page.read_text() == "before\n<!-- kills -->\n\nsecond\n<!-- end of kills -->\nafter\n"
    assert (tmp_path / "kills.json").read_text() == '{\n "runs": 1\n}\n'
    text = (Path(__file__).parents[1] / "docs/security.md").read_text()
    for subject in ("fuzz", "kills", "faults", "memcheck"):
        assert text.count(f"<!-- {subject} -->\n") == text.count(f"<!-- end of {subject} -->") == 1
