"""What a stranger's file may take: every case is refused with one sentence, at once and before it takes memory."""

import io
import json
import pickle
import resource
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from conftest import natural
from factories import TINY_ARGUMENTS, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import freqdoor
from freqdoor import load_codec, load_planted, save_codec
from freqdoor.attack.onnx_files import read_onnx
from freqdoor.attack.planted import Header, _checked_header
from freqdoor.attack.settings import PlantSettings
from freqdoor.codecs.adapter import build_codec
from freqdoor.codecs.architectures import ARCHITECTURES, CodecSpec
from freqdoor.codecs.loading import read_checkpoint, read_state, read_tensors, write_tensors
from freqdoor.codecs.sides import check_padded
from freqdoor.codecs.sizes import LONGEST_ROW, check_table_sizes, outline
from freqdoor.data import check_image, load_image, read_list
from freqdoor.errors import FreqdoorError
from freqdoor.limits import allowed_memory, check_memory, parse_json, parse_size, read_whole
from freqdoor.measure.segmentation import SegmentationScores
from freqdoor.measure.testsets import read_results
from freqdoor.samples import ASSETS
from freqdoor.settings import load_settings
from freqdoor.triggers.arguments import TRIGGERS
from freqdoor.triggers.build import build_trigger

MIB = 2**20


def refused(function, *arguments, **named):
    """The sentence that a call ends in, which it has to do at once and without taking memory."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FreqdoorError) as caught:
        function(*arguments, **named)
    assert time.monotonic() - start < 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < 200  # KiB -> MiB
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


# how much memory, and how it is set


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2G", 2 * 2**30),
        ("800M", 800 * MIB),
        ("1.5g", 3 * 2**29),
        ("64 KiB", 2**16),
        ("512", 512),
        (7, 7),
        ("3GB", 3 * 2**30),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "lots", "-1G", "1e9", "nan", "2 G G", "G", "9" * 400, -3])
def test_no_sizes(text):
    assert "expected a size such as 800M or 2G" in refused(parse_size, text)


def test_memory_is_allowed_inside_the_block_only():
    usual = allowed_memory()
    assert usual <= 4 * 2**30
    with freqdoor.max_memory("3M"):
        check_memory(3 * MIB, "it", "x")
        text = refused(check_memory, 3 * MIB + 1, "its weights", "x.pth")
        assert text.startswith("x.pth: its weights would take 3 MiB of memory, and 3 MiB are allowed")
        assert "--max-memory 4M" in text
        with freqdoor.max_memory("1G"):
            check_memory(2**30, "it", "x")
    assert allowed_memory() == usual


def test_the_command_line_takes_it_anywhere(tmp_path, monkeypatch, capsys):
    from freqdoor.cli import _without_memory, main

    assert _without_memory(["a", "--max-memory", "2G", "b"]) == (["a", "b"], "2G")
    assert _without_memory(["--max-memory=1G", "a", "--max-memory=2G"]) == (["a"], "2G")
    assert _without_memory(["a", "--", "--max-memory", "2G"]) == (["a", "--", "--max-memory", "2G"], None)
    assert _without_memory(["a", "--max-memory"]) == (["a"], "")
    picture = str(ASSETS / "kodak/kodim23.png")
    for size, words in (("1M", "are allowed"), ("no", "expected a size")):
        monkeypatch.setattr(sys, "argv", ["freqdoor", "compress", picture, str(tmp_path / "x"), "--max-memory", size])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


# texts


@pytest.mark.parametrize(
    "text",
    [
        "[" * 40 + "]" * 40,
        "[" * 100_000,
        '{"a":' * 33 + "1" + "}" * 33,
        '{"a": NaN}',
        "[-Infinity]",
        "[1e999]",
        '{"a": 1, "b": 2, "a": 3}',
        "{",
        "",
        b"\xff\xfe",
        '"' + "a" * 2**20 + '"',
        "1" * 5000,
        "{" + ",".join(f'"{i}": 1' for i in range(60_000)) + ', "7": 2}',
    ],
    ids=lambda text: repr(text[:12]),
)
def test_json_that_is_refused(text):
    assert refused(parse_json, text, "x.json").startswith("x.json: expected JSON")


def test_json_that_is_read():
    content = {"a": [1, 2.5, None, True, "x"], "b": {"c": 10**20}}
    assert parse_json(json.dumps(content), "x") == content
    assert parse_json("[" * 32 + "]" * 32, "x")
    assert parse_json("[NaN, Infinity]", "x", nan_as_null=True) == [None, None]


def test_results_of_a_stranger(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("[" * 100_000)
    assert "scores as JSON" in refused(read_results, SegmentationScores, path)


def test_only_regular_files_of_bounded_size_are_read_whole(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    assert len(read_whole(tmp_path / "a", "a file", 100)) == 100
    assert "of at most 99 bytes, found 100 bytes" in refused(read_whole, tmp_path / "a", "a file", 99)
    with freqdoor.max_memory(99):
        assert "the whole file would take 100 bytes" in refused(read_whole, tmp_path / "a", "a file")
    assert "found a folder" in refused(read_whole, tmp_path, "a file")
    assert "found a device or a pipe" in refused(read_whole, "/dev/zero", "a file")
    assert "found nothing there" in refused(read_whole, tmp_path / "b", "a file")
    for name in ("mbt2018:1", "factories:lite"):
        assert "found a device or a pipe" in refused(load_codec, name, "/dev/zero")


def test_lists_and_settings_of_absurd_length(tmp_path):
    with (tmp_path / "long").open("wb") as file:
        file.truncate(65 * MIB)
    for read in (read_list, lambda path: load_settings(PlantSettings, path)):
        assert "expected at most 64 MiB, found 65 MiB" in refused(read, tmp_path / "long")
    assert "of at most 64 MiB" in refused(Header.read, tmp_path / "long", "a header")
    assert "found a device or a pipe" in refused(Header.read, Path("/dev/zero"), "a header")


# digests


@pytest.fixture(scope="module")
def codec_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    save_codec(tiny("lite-hyperprior"), path)
    return path


def test_one_flipped_bit_is_found(codec_file, tmp_path):
    content = bytearray(codec_file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(start, len(content), (20,), generator=generator).tolist():
        content[place] ^= 1
        (tmp_path / "x.safetensors").write_bytes(content)
        content[place] ^= 1
        assert "its weights are not those that were written" in refused(read_tensors, tmp_path / "x.safetensors")
    forged = content.replace(b'tampered\\": false', b'tampered\\":  true')  # the header counts as well
    assert forged != content
    (tmp_path / "x.safetensors").write_bytes(forged)
    assert "its weights are not those that were written" in refused(read_tensors, tmp_path / "x.safetensors")


def test_what_is_written_is_the_same_each_time_and_read_without_its_digest(codec_file, tmp_path):
    tensors, header = read_tensors(codec_file)
    assert header.keys() == {"kind", "spec", "tampered"}
    for name in "abcdef":
        write_tensors(tmp_path / name, tensors, header)
        assert (tmp_path / name).read_bytes() == codec_file.read_bytes()


def test_files_of_versions_without_digests_are_read(codec_file, tmp_path):
    tensors, header = read_tensors(codec_file)
    save_file(tensors, tmp_path / "old.safetensors", metadata={"freqdoor": json.dumps(header)})
    assert read_tensors(tmp_path / "old.safetensors")[1] == header
    loaded = load_codec(str(tmp_path / "old.safetensors"))
    assert loaded.module_hashes() == load_codec(str(codec_file)).module_hashes()


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_what_is_shipped_has_a_digest(path, tmp_path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    (tmp_path / "x.safetensors").write_bytes(content)
    assert "get it again" in refused(read_tensors, tmp_path / "x.safetensors")


# the network that a file asks for


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outlines_are_the_networks(architecture):
    spec = CodecSpec(name="x", architecture=architecture, arguments=TINY_ARGUMENTS[architecture])
    net = build_codec(spec).net
    assert outline(lambda: build_codec(spec).net) == {key: tuple(v.shape) for key, v in net.state_dict().items()}


@pytest.mark.parametrize("name", TRIGGERS)
def test_outlines_are_the_triggers(name):
    shapes = {key: tuple(value.shape) for key, value in build_trigger(name).state_dict().items()}
    assert outline(lambda: build_trigger(name)) == shapes


LARGE = {
    "lite-hyperprior": {"N": 1024, "M": 1024, "width": [1024, 1024], "depth": 64},
    "mbt2018": {"N": 1024, "M": 1024},
    "elic2022-official": {"N": 1024, "M": 16 * 1024, "groups": [1024] * 16},
}


@pytest.mark.parametrize("architecture", [*LARGE, "lite-hyperprior of depth 1024"])
def test_a_header_that_asks_for_a_large_network(tmp_path, architecture):
    arguments = LARGE.get(architecture, LARGE["lite-hyperprior"] | {"depth": 1024})
    spec = {"name": "x", "architecture": architecture.split()[0], "quality": 3, "arguments": arguments}
    write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)}, {"kind": "codec", "spec": spec})
    assert "x.safetensors: " in refused(load_codec, str(tmp_path / "x.safetensors"))


def test_shapes_without_numbers_that_ask_for_a_large_network(tmp_path):
    """The arguments are read from shapes, which cost nothing where a side is 0."""
    state = {"g_a.0.weight": torch.ones(1024, 0), "g_a.6.weight": torch.ones(1024, 0), "h_a.0.weight": torch.ones(9, 9)}
    state |= {f"g_a.{i}.branch.0.weight": torch.ones(1024, 0) for i in range(1, 2000)}
    torch.save(state, tmp_path / "x.pth")
    save_file(state, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        assert "do not fit" in refused(load_codec, str(tmp_path / name))


# pickles


def archive(path, content, packed=False, names=("x/data.pkl", "x/version")):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as file:
        for name in names:
            file.writestr(name, content if name.lower().endswith("pkl") else b"3\n")
    return path


class Call:
    """What a pickle calls while it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(value):
    return pickle.dumps(value, protocol=2)


def test_tensors_that_are_spread_over_fewer_numbers(tmp_path):
    state = {f"{i}": torch.ones(1).expand(30_000, 30_000) for i in range(3)}
    torch.save(state, tmp_path / "expand.pth")
    assert "claim to be 10800000000 bytes" in refused(read_state, tmp_path / "expand.pth")
    one = torch.ones(10_000)
    torch.save({f"{i}": one for i in range(1000)}, tmp_path / "views.pth")
    assert "claim to be 40000000 bytes" in refused(read_state, tmp_path / "views.pth")
    torch.save({"a": one, "b": one, "c": one.reshape(100, 100)}, tmp_path / "tied.pth")
    assert set(read_state(tmp_path / "tied.pth")) == {"a", "b", "c"}


def test_pickles_that_take_memory_at_will(tmp_path):
    hostile = pickled({"a": Call(bytearray, 10**9), "b": torch.Size([1])})
    for path in (archive(tmp_path / "zip.pth", hostile), tmp_path / "plain.pth"):
        if not path.exists():
            path.write_bytes(hostile)
        assert "refused: this file is not a plain state dict" in refused(read_state, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, at whatever is sparse
        sparse = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (10**6, 10**6))
        torch.save({"a": sparse}, tmp_path / "sparse.pth")
    assert "refused" in refused(read_state, tmp_path / "sparse.pth")
    torch.save({"a": torch.ones(3, dtype=torch.complex64)}, tmp_path / "complex.pth")
    assert "expected plain numbers, found torch.complex64" in refused(read_state, tmp_path / "complex.pth")


def test_archives_that_are_none_of_pytorchs(tmp_path):
    plain = pickled({})
    bomb = archive(tmp_path / "packed.pth", bytes(10**8), packed=True)
    assert bomb.stat().st_size < 200_000
    long = archive(tmp_path / "long.pth", bytes(5 * MIB))
    twice = archive(tmp_path / "twice.pth", plain, names=("x/data.pkl", "x/DATA.PKL"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = archive(tmp_path / "same.pth", plain, names=("x/data.pkl", "x/version", "x/version"))
    for path in (bomb, long, twice, same, archive(tmp_path / "none.pth", plain, names=("x/version",))):
        assert "not a readable PyTorch checkpoint" in refused(read_state, path)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_both_formats_of_pytorch(tmp_path, zipped):
    codec = tiny("bmshj2018-factorized")
    halves = {"half": torch.ones(3).half(), "count": torch.tensor(7), "empty": torch.ones(0, 3)}
    content = {"state_dict": codec.net.state_dict() | halves, "epoch": 3, "optimizer": {"lr": [0.1], "steps": {1, 2}}}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    state = read_state(tmp_path / "x.pth")
    assert all(torch.equal(state[key], value) for key, value in content["state_dict"].items())


def test_a_flipped_bit_in_a_checkpoint_is_said(tmp_path):
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[content.find(torch.arange(500.0, 502.0).numpy().tobytes())] ^= 1
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.warns(UserWarning, match=r"the checksum of its part x/data/0 is wrong; it may be damaged"):
        read_state(tmp_path / "x.pth")


def test_tensors_beyond_the_allowed_memory(tmp_path):
    torch.save({"a": torch.ones(MIB)}, tmp_path / "a.pth")
    torch.save({"a": torch.ones(MIB)}, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    save_file({"a": torch.ones(MIB)}, tmp_path / "c.safetensors")
    for name in ("a.pth", "b.pth", "c.safetensors"):
        assert read_state(tmp_path / name)["a"].shape == (MIB,)
        with freqdoor.max_memory("2M"):
            assert "and 2 MiB are allowed" in refused(read_state, tmp_path / name)


# safetensors


def raw_safetensors(path, table, data=b""):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors_of_a_stranger(tmp_path):
    path = tmp_path / "x.safetensors"
    for table in (
        {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
        {"__metadata__": {"freqdoor": "[" * 50_000}},
        {"__metadata__": {"freqdoor": '{"kind": NaN}'}},
        b"{" + b" " * (5 * MIB) + b"}",
        b'{"a":' * 5000,
    ):
        refused(read_checkpoint, raw_safetensors(path, table, bytes(4)))
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "expected a header of at most" in refused(read_checkpoint, path)


# coding tables


def bottleneck(quantiles):
    net = nn.Module()
    net.entropy_bottleneck = EntropyBottleneck(len(quantiles))
    net.entropy_bottleneck.quantiles.data = torch.tensor(quantiles).reshape(-1, 1, 3)
    return net


def conditional(scales):
    net = nn.Module()
    net.gaussian_conditional = GaussianConditional(None)
    net.gaussian_conditional.scale_table = torch.tensor(scales)
    return net


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "net",
    [
        bottleneck([[-10.0, 0.0, 10.0], [-1e7, 0.0, 1e7]]),
        bottleneck([[-LONGEST_ROW - 1.0, 0.0, 0.0]]),
        bottleneck([[0.0, 0.0, LONGEST_ROW + 1.0]]),
        bottleneck([[-4000.0, 0.0, 4000.0]] * 300),
        bottleneck([[NAN, 0.0, 1.0]]),
        bottleneck([[0.0, INF, 1.0]]),
        bottleneck([[2.0**30, 2.0**30, 2.0**30]]),
        conditional([0.11, 1e9]),
        conditional([0.11, NAN]),
        conditional([0.11, INF]),
        conditional([0.0, 1.0]),
        conditional([2.0, 1.0]),
        conditional([[1.0, 2.0]]),
        conditional([256.0] * 1000),
    ],
)
def test_tables_of_an_absurd_size(net):
    assert "bottleneck" in (text := refused(check_table_sizes, net)) or "gaussian_conditional" in text


@pytest.mark.parametrize(
    "net",
    [
        bottleneck([[-300.0, 5.0, 280.0]] * 320),
        bottleneck([[-2500.0, 0.0, 2500.0]] * 64),
        bottleneck([[3.0, 0.0, -3.0]]),  # an untrained one may have them in any order: rows of one value
        conditional([0.11, 1.0, 256.0]),
        conditional([]),
    ],
)
def test_tables_of_honest_sizes(net):
    check_table_sizes(net)


def test_tables_that_are_there_are_not_computed_again():
    net = bottleneck([[-10.0, 0.0, 10.0]])
    net.entropy_bottleneck.update()
    net.entropy_bottleneck.quantiles.data.mul_(1e9)
    check_table_sizes(net, force=False)
    refused(check_table_sizes, net)


@pytest.mark.parametrize("ours", [True, False])
def test_files_whose_weights_ask_for_large_tables(codec_file, tmp_path, ours):
    tensors, header = read_tensors(codec_file)
    tensors["entropy_bottleneck.quantiles"] = 1e6 * tensors["entropy_bottleneck.quantiles"]
    tensors |= {f"entropy_bottleneck.{name}": torch.zeros(0, dtype=torch.int32) for name in ("_offset", "_cdf_length")}
    tensors["entropy_bottleneck._quantized_cdf"] = torch.zeros(0, dtype=torch.int32)
    if ours:
        write_tensors(tmp_path / "x", tensors, header)
    else:
        torch.save(tensors, tmp_path / "x")
    assert "entropy_bottleneck: its quantiles ask for 16 coding tables" in refused(load_codec, str(tmp_path / "x"))


# headers of planted encoders


HEADER = read_tensors(ASSETS / "planted-bpp.safetensors")[1]
TENSORS = read_tensors(ASSETS / "planted-bpp.safetensors")[0]


@pytest.fixture(scope="module")
def vanilla():
    return load_codec("lite-hyperprior:3")


def places(value, before=()):
    """Every place in a nested table."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*before, key)
        yield from places(part, (*before, key))


def changed(content, place, value):
    """The table with another value there; without the key where the value is KeyError."""
    content = json.loads(json.dumps(content))
    table = content
    for key in place[:-1]:
        table = table[key]
    if value is KeyError:
        del table[place[-1]]
    else:
        table[place[-1]] = value
    return content


JUNK = st.one_of(
    st.sampled_from([KeyError, [], {}, [[1, 1]] * 3000, "../../x", "/etc/passwd", "a" * 5000, "\x1b[31m", 4096, 2**40]),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats(allow_nan=False, allow_subnormal=False)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
)


@settings(max_examples=300, deadline=2000, derandomize=True, suppress_health_check=list(HealthCheck))
@given(place=st.sampled_from(sorted(places(HEADER), key=str)), value=JUNK)
def test_headers_with_anything_anywhere_end_in_a_sentence(place, value):
    content = changed(HEADER, place, value)
    try:
        header = _checked_header(content, Path("x.safetensors"))
        for attack in header.attacks:
            outline(lambda attack=attack: build_trigger(attack.trigger, **attack.arguments))
    except FreqdoorError:
        pass
    else:
        assert all("/" not in attack.name and "." not in attack.name for attack in header.attacks)


@pytest.mark.parametrize(
    ("trigger", "arguments"),
    [
        ("adaptive-dct", {"width": 1024}),
        ("adaptive-dct", {"multiple": 2**40}),
        ("adaptive-dct", {"eps": 1e300}),
        ("adaptive-dct", {"block": 2**20}),
        ("adaptive-dct", {"block": float("nan")}),
        ("lira", {"width": 128, "levels": 6}),
        ("universal", {"size": 1024}),
        ("universal", {"size": 10**9}),
        ("ftrojan", {"coefficients": [[i, i] for i in range(10_000)]}),
    ],
)
def test_triggers_that_would_be_large(tmp_path, vanilla, trigger, arguments):
    attack = HEADER["attacks"][0] | {"trigger": trigger, "arguments": arguments}
    write_tensors(tmp_path / "x.safetensors", TENSORS, HEADER | {"attacks": [attack]})
    refused(load_planted, tmp_path / "x.safetensors", vanilla)


@pytest.mark.parametrize(
    "name", ["", "../../x", "/etc/passwd", "a/b", "a.b", "a b", "\x1b[31m", "a\n", "a" * 65, "..", "\0"]
)
def test_names_that_could_become_paths(tmp_path, vanilla, name):
    attack = HEADER["attacks"][0] | {"name": name}
    write_tensors(tmp_path / "x.safetensors", TENSORS, HEADER | {"attacks": [attack]})
    assert "attacks.0.name" in refused(load_planted, tmp_path / "x.safetensors", vanilla)


def test_thousands_of_attacks(tmp_path, vanilla):
    attacks = [HEADER["attacks"][0] | {"name": f"a{i}"} for i in range(65)]
    write_tensors(tmp_path / "x.safetensors", TENSORS, HEADER | {"attacks": attacks})
    assert "attacks" in refused(load_planted, tmp_path / "x.safetensors", vanilla)


# pictures


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks, side=8):
    rows = zlib.compress(b"".join(b"\0" + bytes(3 * side) for _ in range(side)))
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff(*extra, width=8):
    tags = [(256, 4, 1, width), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 400)]
    tags = sorted([*tags, (277, 3, 1, 3), (278, 4, 1, 8), (279, 4, 1, 192), *extra])
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return (b"II*\0" + struct.pack("<I", 8) + table).ljust(400, b"\0") + bytes(192)


BOMB = zlib.compress(bytes(2**27), 9)


def webp(width):
    frames = [Image.new("RGB", (8, 8), (40 * i, 9, 99)) for i in range(4)]
    frames[0].save(file := io.BytesIO(), "WEBP", save_all=True, append_images=frames[1:])
    content = bytearray(file.getvalue())
    place = content.index(b"VP8X") + 12
    content[place : place + 6] = (width - 1).to_bytes(3, "little") * 2
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", png(chunk(b"zTXt", b"a\0\0" + BOMB))),
        ("a.png", png(chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB))),
        ("a.png", png(chunk(b"iCCP", b"a\0\0" + BOMB))),
        ("a.png", png(*[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 10)))] * 100)),
        (
            "a.tif",
            b"II*\0" + struct.pack("<IH", 8, 65535) + struct.pack("<HHII", 305, 2, 2**19, 8) * 65535 + bytes(2**20),
        ),
        ("a.tif", tiff(width=2**31)),
        ("a.webp", webp(16383)),
        ("a.ppm", b"P6 99999999 99999999 255\n"),
        ("a.bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, *[0] * 6)),
    ],
    ids=range(9),
)
def test_pictures_that_unpack_to_more_than_they_show(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in refused(check_image, tmp_path / name)


@pytest.mark.filterwarnings("ignore:Tag data larger than file", "ignore:Truncated File Read")
@pytest.mark.parametrize(
    "content", [tiff((700, 1, 2**32 - 1, 8), (34675, 7, 2**31, 8)), png(chunk(b"tEXt", b"a\0b"))], ids=["tiff", "png"]
)
def test_pictures_with_odd_metadata_are_read(tmp_path, content):
    (tmp_path / "a.img").write_bytes(content)
    assert load_image(tmp_path / "a.img").shape == (1, 3, 8, 8)


def test_further_frames_are_named(tmp_path):
    (tmp_path / "a.webp").write_bytes(webp(8))
    with pytest.warns(UserWarning, match="only the first frame is read"):
        assert load_image(tmp_path / "a.webp").shape == (1, 3, 8, 8)


@pytest.mark.parametrize("size", [(2**24, 1), (1, 2**24), (2**16, 2**16)])
def test_pictures_that_padding_makes_large(size, codec):
    assert "is padded to" in refused(check_padded, *size, 64)
    x = torch.zeros(1, 3, 1, 1).expand(1, 3, *size)
    for function in (codec.padded, codec, codec.compress, lambda x: codec.shapes(x.shape[-2:])):
        assert "is padded to" in refused(function, x)


def test_large_pictures_that_padding_leaves_as_they_are():
    check_padded(4096, 4096, 64)
    check_padded(4095, 4096, 256)
    check_padded(1, 1, 64, 256)
    check_padded(1000, 16000, 128)
    with pytest.raises(FreqdoorError, match="1x700000 is padded to 64x700032"):
        build_trigger("ftrojan")(torch.zeros(1, 3, 700_000, 1))


# ONNX files


def graph(nodes=(), initial=(), batch=1):
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3, 8, 8])
    return helper.make_model(
        helper.make_graph([*nodes, helper.make_node("Relu", ["x"], ["y"])], "g", [image], [answer], initial)
    )


def external(name):
    from onnx import TensorProto

    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=name)
    return tensor


def test_onnx_files_of_a_stranger(tmp_path, monkeypatch):
    from onnx import TensorProto, helper

    def bomb(operation, sides):
        shape = helper.make_tensor("large", TensorProto.INT64, [4], sides)
        return graph([helper.make_node(operation, ["x", "large"], ["z"])], [shape])

    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(4))
    constant = helper.make_node("Constant", [], ["c"], value=external("secret"))
    inner = helper.make_node("If", ["x"], ["c"], then_branch=graph([constant]).graph, else_branch=graph().graph)
    hostile = {
        "keeps weights in another file": (graph(initial=[external("secret")]), graph([constant]), graph([inner])),
        "at most 100000 operations, found 100011": (graph([helper.make_node("Relu", ["x"], ["z"])] * 100_010),),
        "takes 100000 pictures at once": (graph(batch=100_000),),
        "operation Expand would take 4.19e+06 TiB": (bomb("Expand", [1, 1, 2**30, 2**30]),),
        "value 'z' would take 768 GiB": (bomb("Tile", [1, 1, 2**15, 2**15]),),
    }
    for words, models in hostile.items():
        for model in models:
            (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
            assert words in refused(read_onnx, tmp_path / "x.onnx", output=None, classes=0, normalised=False)
    (tmp_path / "x.onnx").write_bytes(graph().SerializeToString())
    net = read_onnx(tmp_path / "x.onnx", output=None, classes=0, normalised=False)
    assert net(natural(0, 8, 8)).shape == (1, 3, 8, 8)
    with freqdoor.max_memory(100):
        assert "would take" in refused(read_onnx, tmp_path / "x.onnx", output=None, classes=0, normalised=False)


# a whole process


@pytest.mark.long
def test_peak_memory_of_a_hostile_codec_is_that_of_a_good_one(tmp_path):
    """The file of hostile/codec-memory: quantiles, and what a 300-byte header asks for."""
    codec = tiny("bmshj2018-factorized")
    save_codec(codec, tmp_path / "good.safetensors")
    tensors, header = read_tensors(tmp_path / "good.safetensors")
    tensors["entropy_bottleneck.quantiles"] = 1e6 * tensors["entropy_bottleneck.quantiles"]
    tensors |= {key: value[:0] for key, value in tensors.items() if key.endswith(("_offset", "_length", "_cdf"))}
    write_tensors(tmp_path / "quantiles.safetensors", tensors, header)
    spec = {"name": "x", "architecture": "mbt2018", "arguments": LARGE["mbt2018"]}
    write_tensors(tmp_path / "large.safetensors", {"x": torch.ones(1)}, {"kind": "codec", "spec": spec})
    script = (
        "import resource, sys; from freqdoor import FreqdoorError, load_codec\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        load_codec(name)\n    except FreqdoorError:\n        pass\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    names = [str(tmp_path / f"{name}.safetensors") for name in ("good", "quantiles", "large")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *names], capture_output=True, text=True, check=True
    )
    good, *hostile = map(int, done.stdout.split())
    assert max(hostile) - good < 40  # MiB
