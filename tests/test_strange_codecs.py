"""Codecs as they are met in the wild: they work and lose nothing, or one sentence says what they lack."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import strange
import torch
from conftest import natural
from torch import nn

from freqdoor import load_codec, save_codec
from freqdoor.codecs import protocol
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.architectures import ARCHITECTURES
from freqdoor.codecs.container import pack, unpack
from freqdoor.codecs.sides import find_sides, padding
from freqdoor.errors import FreqdoorError, Terminated

pytestmark = pytest.mark.whole

SHARED = Path(__file__).parents[2] / "shared/weights/codec_meanscale_n32"


def line_at_fault(name: str) -> int:
    """The line of strange.py that is marked as the one at fault, of the function or class called `name`."""
    lines = Path(strange.__file__).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"(class|def) {name}\b", line))
    return next(i for i, line in enumerate(lines[start:], start + 1) if "the line at fault" in line)


def coded_by_the_network(net: nn.Module, x: torch.Tensor) -> list[bytes]:
    """All strings that the network itself writes of an image, in order."""

    def leaves(part):
        if isinstance(part, bytes):
            return [part]
        parts = part.values() if isinstance(part, dict) else part
        return [leaf for inner in parts for leaf in leaves(inner)]

    with torch.no_grad():
        return leaves(net.compress(x)["strings"])


@pytest.mark.parametrize(
    ("name", "multiple", "least"),
    [
        ("plain", 64, 64),
        ("windows", 128, 128),
        ("shrinking_windows", 128, 128),
        ("wide_windows", 256, 256),
        ("odd_windows", 192, 192),
        ("smallest", 64, 256),
        ("told", 128, 128),
        ("rounded_up", 128, 128),
    ],
)
def test_what_images_are_padded_to_is_found_and_every_size_round_trips(name, multiple, least):
    codec = load_codec(f"strange:{name}")
    assert (codec.multiple, codec.least) == (multiple, least)
    for size in ((40, 70), (multiple + 2, 100)):
        x = natural(1, *size)
        bitstream = codec.compress(x)[0]
        arrived = unpack(pack(bitstream, codec), codec)
        assert arrived == bitstream
        padded = codec.padded(x)
        assert all(side % multiple == 0 and side >= least for side in padded.shape[-2:])
        assert list(bitstream.strings) == coded_by_the_network(codec.net, padded)
        with torch.no_grad():
            expected = codec(x).x_hat.clamp(0, 1)
        assert codec.decompress(arrived).shape == x.shape
        torch.testing.assert_close(codec.decompress(arrived), expected, atol=1e-4, rtol=0)
        assert bitstream.latent_shape == codec.latent_shape(size)


def test_the_user_may_say_the_multiple():
    codec = load_codec("strange:plain", multiple=192)
    assert (codec.multiple, codec.least) == (192, 192)
    assert codec.padded(natural(1, 100, 200)).shape[-2:] == (192, 384)
    x = natural(1, 100, 200)
    with torch.no_grad():
        torch.testing.assert_close(codec.decompress(codec.compress(x)[0]), codec(x).x_hat.clamp(0, 1))
    for wrong in (0, -64, 10**6):
        with pytest.raises(FreqdoorError, match="expected 1 to"):
            load_codec("strange:plain", multiple=wrong)
    with pytest.raises(FreqdoorError, match=r"takes pictures of every size that is a multiple of 64 pixels.*shape"):
        load_codec("strange:windows", multiple=64)
    with pytest.raises(FreqdoorError, match="shape of latents that grows"):
        load_codec("strange:rounded_up", multiple=64)


def test_a_network_of_one_size_is_refused():
    with pytest.raises(FreqdoorError, match=r"multiple of one of 64 to 512 pixels.*made for pictures of 256 x 256"):
        load_codec("strange:one_size")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_known_architectures_take_64_as_they_say(architecture):
    from factories import tiny

    codec = tiny(architecture)
    assert find_sides(codec.net, architecture) == codec.sides == (64, 64)


def test_searching_leaves_modes_and_random_numbers_alone():
    net = strange.plain().train()
    net.h_a.eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    find_sides(net, "net")
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert net.g_a[0].training
    assert not net.h_a.training


def test_padding_is_compressais():
    from compressai.ops import compute_padding

    for height, width in ((1, 1), (64, 65), (75, 50), (128, 191)):
        assert padding(height, width, 64) == compute_padding(height, width, min_div=64)
        assert padding(height, width, 64, 128) == compute_padding(
            height, width, out_h=max(128, -(-height // 64) * 64), out_w=max(128, -(-width // 64) * 64)
        )
    assert padding(10, 10, 64, 100) == compute_padding(10, 10, out_h=128, out_w=128)


@pytest.mark.parametrize(
    ("name", "strings"),
    [("slices", 4), ("nested", 4), ("named", 4), ("named_shape", 4), ("short", 5), ("list_likelihoods", 2)],
)
def test_strings_are_kept_whatever_they_lie_in(name, strings):
    codec, x = load_codec(f"strange:{name}"), natural(2, 75, 140)
    bitstream = codec.compress(x)[0]
    assert list(bitstream.strings) == coded_by_the_network(codec.net, codec.padded(x))
    assert len(bitstream.strings) == strings
    assert len(set(bitstream.strings)) == strings
    arrived = unpack(pack(bitstream, codec), codec)
    with torch.no_grad():
        expected = codec(x).x_hat.clamp(0, 1)
    torch.testing.assert_close(codec.decompress(arrived), expected, atol=1e-4, rtol=0)


def test_likelihoods_in_a_list_count_alike():
    x = natural(2, 64, 128)
    listed, named = load_codec("strange:list_likelihoods"), load_codec("strange:plain")
    with torch.no_grad():
        assert torch.equal(listed(x).bits, named(x).bits)
        assert float(named(x).bits) > 0


@pytest.mark.parametrize(
    "name",
    ["plain_update", "dropout_zero", "half", *(name for name in vars(strange) if name.startswith("variable_rate"))],
)
@pytest.mark.filterwarnings("ignore:.* codes its context model by a loop of its own")
def test_what_needs_no_more_than_the_protocol_is_taken(name):
    codec, x = load_codec(f"strange:{name}"), natural(2, 75, 140)
    with torch.no_grad():
        expected = codec(x).x_hat.clamp(0, 1)
    torch.testing.assert_close(codec.decompress(codec.compress(x)[0]), expected, atol=1e-4, rtol=0)
    assert all(p.dtype == torch.float32 for p in codec.parameters())


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("loses", "decompress: expected what forward gives in eval mode"),
        ("darker", "decompress: expected what forward gives in eval mode"),
        ("too_large", r"decompress: expected x_hat of the images' size \(1, 3, 64, 128\), found \(1, 3, 65, 129\)"),
        ("varies", "compress: expected strings and shape that follow from the size"),
        ("numbers", "compress: expected strings as bytes, nested as they may be, found int"),
        ("with_minimum", r"decompress: TypeError in WithMinimum\.decompress \(.*strange\.py:\d+\): .*'minimum'"),
        ("graphics_card", r"compress: AssertionError in compress \(.*strange\.py:\d+\): Torch not compiled with CUDA"),
        ("demanding_update", r"update: TypeError in DemandingUpdate\.update \(.*strange\.py:\d+\): .*'scale_table'"),
        ("compress_q", r"compress: TypeError in CompressQ\.compress \(.*strange\.py:\d+\): .*'q'"),
        ("forward_q", r"forward: TypeError in ForwardQ\.forward \(.*strange\.py:\d+\): .*'q'"),
        ("tuple_out", "forward: expected forward.*found tuple without x_hat"),
        ("flat_likelihoods", "forward: expected forward.*a dict of x_hat, y_likelihoods without likelihoods"),
        ("no_tensors", "forward: expected likelihoods as tensors with one row for each image, found float"),
        ("around_g_a", r"forward: expected it to call g_a once, as self\.g_a\(x\).*no such call"),
        ("one_channel", r"RuntimeError in Slices\.forward|RuntimeError.*1 channels"),
        ("dropout", r"g_a\.7 \(Dropout\) behaves differently"),
        ("needs_quality", r"factory: TypeError in needs_quality \(.*strange\.py:\d+\): .*'quality'"),
        ("nothing", r"expected a network \(torch\.nn\.Module\), found NoneType"),
        ("one_after_another", r"expected a network \(torch\.nn\.Module\), found generator"),
        ("whole_numbers", r"forward: expected x_hat of real numbers in \[0, 1\], found torch\.uint8"),
        ("complex_numbers", r"forward: expected x_hat of real numbers in \[0, 1\], found torch\.complex64"),
        ("counted", "forward: expected likelihoods as tensors with one row for each image, found torch.int64"),
        ("elsewhere", "forward: expected what it returns where the images are, on cpu"),
        ("not_a_number", "decompress: expected what forward gives in eval mode"),
        ("its_input", "decompress: expected what forward gives in eval mode"),
    ],
)
def test_what_does_not_follow_the_protocol_ends_in_one_sentence(name, match):
    with pytest.raises(FreqdoorError, match=rf"strange:{name}: .*(?:{match})|strange:{name}: {match}") as caught:
        load_codec(f"strange:{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("factory", "function", "code"),
    [
        ("raises", "adjusted", "Raises"),
        ("wrong_config", "wrong_config", "wrong_config"),
        ("ends_the_program", "ends_the_program", "ends_the_program"),
        ("of_its_own", "of_its_own", "of_its_own"),
        ("without_end", "without_end", "without_end"),
        ("warns", "warns", "warns"),
        ("ends", "decompress", "Ends"),
    ],
)
def test_the_line_at_fault_is_named_and_the_cause_is_kept(factory, function, code):
    place = rf"in {function} \({re.escape(strange.__file__)}:{line_at_fault(code)}\)"
    with pytest.raises(FreqdoorError, match=place) as caught:
        load_codec(f"strange:{factory}")
    assert caught.value.__cause__ is not None


def test_what_a_factory_changes_for_the_whole_program_is_put_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = [function for function, _ in protocol.SHARED.values()]
    before = [function() for function in ask]
    with pytest.warns(UserWarning, match="put back") as caught:
        codec = load_codec("strange:moves")
    assert [function() for function in ask] == before
    [message] = [str(warning.message) for warning in caught if "put back" in str(warning.message)]
    assert message.startswith(
        "strange:moves: changes the working directory, PyTorch's threads, PyTorch's default dtype,"
    )
    assert "Ctrl-C" in message
    assert "SIGTERM" not in message
    assert all(p.dtype == torch.float32 for p in codec.parameters())


def test_a_module_that_ends_the_program_while_it_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaving.py").write_text("import os, sys\nos.chdir('/')\nsys.exit('no licence')\n")
    place = os.getcwd()
    with (
        pytest.warns(UserWarning, match="leaving:make: changes the working directory; put back"),
        pytest.raises(FreqdoorError, match=r"SystemExit in <module> \(.*leaving\.py:3\): no licence"),
    ):
        load_codec("leaving:make")
    assert os.getcwd() == place


def test_ctrl_c_is_no_mistake_of_a_users_code():
    def interrupted():
        raise Terminated

    with pytest.raises(Terminated):
        protocol.call("name", "factory", interrupted)


def test_a_network_that_a_pass_changes_is_refused_with_its_place():
    place = (
        rf"a pass changes g_s; look into Learns\.forward \({re.escape(strange.__file__)}:{line_at_fault('Learns')}\)"
    )
    with pytest.raises(FreqdoorError, match=place):
        load_codec("strange:learns")


def test_a_picture_of_double_precision_is_a_picture():
    codec, x = load_codec("strange:double"), natural(2, 64, 64)
    assert codec.decompress(codec.compress(x)[0]).dtype == codec(x).x_hat.dtype == torch.float32


def test_modules_that_cannot_be_imported_name_their_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "unwritten.py").write_text("x = 1\nraise ZeroDivisionError('by hand')\n")
    (tmp_path / "misspelt.py").write_text("x = 1\ndef make(:\n")
    with pytest.raises(FreqdoorError, match=r"ZeroDivisionError in <module> \(.*unwritten\.py:2\): by hand"):
        load_codec("unwritten:make")
    with pytest.raises(FreqdoorError, match=r"SyntaxError in .*misspelt\.py:2"):
        load_codec("misspelt:make")


def test_compressais_own_zoo_function_is_a_factory_that_lacks_its_quality():
    with pytest.raises(
        FreqdoorError, match=r"in bmshj2018_hyperprior \(.*image\.py.*'quality'.*a function that needs no"
    ):
        load_codec("compressai.zoo:bmshj2018_hyperprior")


def test_variable_rate_names_and_checkpoints_say_what_to_do(tmp_path):
    torch.save(strange.variable_rate().state_dict(), tmp_path / "vbr.pth")
    for name in ("bmshj2018-hyperprior-vbr:3", str(tmp_path / "vbr.pth")):
        with pytest.raises(FreqdoorError, match="variable-rate network holds eight qualities"):
            load_codec(name)
    loaded = load_codec("strange:variable_rate", tmp_path / "vbr.pth")
    assert loaded.module_hashes() == load_codec("strange:variable_rate").module_hashes()


def test_y_is_what_g_a_gives_in_the_same_pass():
    codec, x = load_codec("strange:plain"), natural(2, 70, 100)
    with torch.no_grad():
        out = codec(x)
        assert torch.equal(out.y, codec.net.g_a(codec.padded(x)))
        codec.precision = torch.bfloat16
        cast = codec(x)
    assert cast.y.dtype == torch.float32
    assert not torch.equal(cast.y, out.y)
    torch.testing.assert_close(cast.y, out.y, atol=0.1 * float(out.y.abs().max()), rtol=0)
    codec.train()
    codec.precision = torch.float32
    codec(x).y.sum().backward()
    assert all(p.grad is not None for p in codec.net.g_a.parameters())
    assert codec.net.g_s[0].weight.grad is None


def test_precision_hangs_on_the_codec_and_on_nothing_else():
    codec, x = load_codec("strange:plain"), natural(2, 64, 64)
    hashes, keys = codec.module_hashes(), list(codec.state_dict())
    codec.precision = torch.bfloat16
    assert codec.module_hashes() == hashes
    assert list(codec.state_dict()) == keys
    assert "forward" not in vars(codec.net.g_a)
    other = copy.deepcopy(codec)
    assert other.precision == torch.bfloat16
    other.precision = torch.float32
    with torch.no_grad():
        cast, plain = codec(x), other(x)
    assert codec.precision == torch.bfloat16
    assert not torch.equal(cast.x_hat, plain.x_hat)
    assert not torch.is_autocast_enabled("cpu")
    codec.precision = torch.float32
    with torch.no_grad():
        assert torch.equal(codec(x).x_hat, plain.x_hat)


def test_autocast_ends_when_the_network_raises():
    codec = load_codec("strange:plain")
    codec.precision = torch.bfloat16
    with pytest.raises(FreqdoorError, match=r"forward: RuntimeError"):
        codec(torch.zeros(1, 4, 64, 64))
    assert not torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        assert codec(torch.zeros(1, 3, 64, 64)).y.dtype == torch.float32


@pytest.mark.long
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_compiled_and_distributed_codecs_give_the_same(precision, tmp_path):
    codec, x = load_codec("strange:plain"), natural(2, 64, 64)
    codec.precision = precision
    with torch.no_grad():
        expected = codec(x)
        compiled = torch.compile(codec, backend="eager")(x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(codec)
        with torch.no_grad():
            distributed = parallel(x)
    finally:
        torch.distributed.destroy_process_group()
    for other in (compiled, distributed):
        assert torch.equal(other.x_hat, expected.x_hat)
        assert torch.equal(other.y, expected.y)
        assert torch.equal(other.bits, expected.bits)


@pytest.mark.skipif(not SHARED.exists(), reason="the codec of other authors is not here")
def test_a_codec_that_others_trained(monkeypatch):
    monkeypatch.syspath_prepend(SHARED)
    codec, x = load_codec("thirdparty_codec:make"), natural(4, 100, 150)
    assert (codec.multiple, codec.least) == (64, 64)
    bitstream = codec.compress(x)[0]
    assert list(bitstream.strings) == coded_by_the_network(codec.net, codec.padded(x))
    with torch.no_grad():
        out = codec(x)
    torch.testing.assert_close(codec.decompress(bitstream), out.x_hat.clamp(0, 1), atol=1e-4, rtol=0)
    assert 8 * bitstream.num_bytes == pytest.approx(float(out.bits), rel=0.1)


@pytest.mark.long
def test_importing_compressai_says_nothing():
    code = "import warnings; warnings.simplefilter('error'); import freqdoor.codecs.loading"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_saved_stranger_keeps_its_tables(tmp_path):
    codec = load_codec("strange:scaled")
    save_codec(codec, tmp_path / "codec.safetensors")
    again = load_codec("strange:plain", tmp_path / "codec.safetensors")
    assert isinstance(again, Codec)
    assert again.module_hashes() == codec.module_hashes()
    assert again.net.gaussian_conditional.scale_table.numel() == 20
