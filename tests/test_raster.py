"""Context models in raster order: our waves and CompressAI's loops over pixels are the same to the last bit."""

import warnings

import pytest
import torch
from compressai.entropy_models import GaussianConditional
from compressai.latent_codecs import RasterScanLatentCodec
from compressai.layers import CheckerboardMaskedConv2d, MaskedConv2d
from compressai.models import JointAutoregressiveHierarchicalPriors
from conftest import natural
from factories import tiny
from torch import nn

from freqdoor import build_trigger, poisoned
from freqdoor.codecs import coding, raster
from freqdoor.codecs.adapter import Codec, CodecSpec

pytestmark = pytest.mark.whole

RASTER = ["mbt2018", "cheng2020-anchor", "cheng2020-attn"]


def loud(architecture: str) -> Codec:
    """A codec whose latents need many rows of the tables and leave some of them."""
    codec = tiny(architecture)
    last = [module for module in codec.net.g_a if isinstance(module, nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight.mul_(30)
        codec.net.entropy_parameters[-1].weight.mul_(40)
    return codec


def both_ways(codec: Codec, x: torch.Tensor) -> None:
    """Our strings are CompressAI's own, and each decodes the other's to the same picture."""
    ours, pictures = codec.compress(x), []
    for coder in ("compressai", "freqdoor"):
        codec.coder = coder
        assert [stream.strings for stream in codec.compress(x)] == [stream.strings for stream in ours]
        pictures.append(codec.decompress(ours[0]))
    assert torch.equal(*pictures)


@pytest.mark.parametrize("architecture", RASTER)
@pytest.mark.parametrize("size", [(64, 64), (40, 300), (130, 70)])
def test_strings_are_compressais_and_each_decodes_the_others(architecture, size):
    codec = loud(architecture)
    both_ways(codec, natural(3, *size))


def test_poisoned_pictures_too():
    codec = loud("mbt2018")
    trigger = build_trigger("ftrojan")
    both_ways(codec, poisoned(trigger, natural(4, 96, 128), strength=3.0))


def test_what_was_decoded_comes_back_to_the_encoder():
    """y_hat of the encoder is what the decoder reads, and no pixel keeps its y."""
    codec = loud("mbt2018")
    net, y = codec.net, torch.randn(1, 24, 5, 9) * 3
    params = torch.randn(1, 48, 5, 9)
    context = raster.Context(net.context_prediction, net.entropy_parameters, net.gaussian_conditional)
    tables = coding.tables_of(net.gaussian_conditional)
    padded = nn.functional.pad(y, (2, 2, 2, 2))
    encoder = coding.Encoder()
    raster.encode_pixels(encoder, padded, params, context, tables)
    y_hat = torch.zeros_like(padded)
    decoder = coding.Decoder(encoder.flush())
    raster.decode_pixels(decoder, y_hat, params, context, tables)
    decoder.finish()
    assert torch.equal(y_hat, padded)
    assert 0 < (y_hat[..., 2:-2, 2:-2] - y).abs().max() <= 0.5 + 1e-5


def test_convolutions_that_compute_other_bits_in_a_batch_go_pixel_by_pixel(monkeypatch):
    convolved, batches = nn.functional.conv2d, []

    def by_batch(crops, *rest, **named):
        batches.append(len(crops))
        return convolved(crops, *rest, **named) * (1 + 1e-3 * (len(crops) > 2))

    codec = loud("mbt2018")
    monkeypatch.setattr(raster.F, "conv2d", by_batch)
    codec.compress(natural(3, 64, 192))
    assert raster._TRIED[codec.net.context_prediction] == 2
    batches.clear()
    both_ways(codec, natural(3, 64, 192))
    assert max(batches) == 2


def test_no_bits_hang_on_where_a_pixel_lies_in_a_batch():
    """Odd numbers of channels, so that neighbours in a batch are not aligned as single pixels are; waves in parts."""
    for seed in range(2):
        torch.manual_seed(seed)
        parameters = nn.Sequential(nn.Conv2d(14, 9, 1), nn.Tanh(), nn.Conv2d(9, 6, 1))
        conditional = GaussianConditional([0.11, 0.5, 1.0, 4.0])
        codec = RasterScanLatentCodec(conditional, parameters, MaskedConv2d(3, 6, 5, padding=2)).eval()
        conditional.update()
        y, params = torch.randn(1, 3, 18, 52) * 4, torch.randn(1, 8, 18, 52)  # up to 18 pixels in a wave
        with torch.no_grad():
            expected = codec.compress(y, params)
            with coding.coding():
                assert torch.equal(codec.compress(y, params)["y_hat"], expected["y_hat"])


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_latent_codecs_in_raster_order(kernel):
    def merge(*parts):
        return torch.cat(parts[::-1], dim=1)

    torch.manual_seed(0)
    codec = RasterScanLatentCodec(
        gaussian_conditional=GaussianConditional([0.11, 0.5, 1.0, 4.0]),
        entropy_parameters=nn.Sequential(nn.Conv2d(14, 9, 1), nn.Tanh(), nn.Conv2d(9, 6, 1)),
        context_prediction=MaskedConv2d(3, 6, kernel, padding=kernel // 2),
    ).eval()
    codec.merge = merge
    codec.gaussian_conditional.update()
    y, params = torch.randn(1, 3, 7, 11) * 4, torch.randn(1, 8, 7, 11)
    with torch.no_grad():
        expected = codec.compress(y, params)
        with coding.coding() as tally:
            coded = codec.compress(y, params)
        assert tally.loops == ["RasterScanLatentCodec"]
        assert coded["strings"] == expected["strings"]
        assert torch.equal(coded["y_hat"], expected["y_hat"])
        with coding.coding() as tally:
            decoded = codec.decompress(coded["strings"], (7, 11), params)
        assert tally.loops == ["RasterScanLatentCodec"]
        assert torch.equal(decoded["y_hat"], expected["y_hat"])


class OtherRows(GaussianConditional):
    """A stranger's: one row further up."""

    def build_indexes(self, scales):
        return (super().build_indexes(scales) - 1).clamp_min(0)


@pytest.mark.parametrize("part", ["mask", "kind of convolution", "conditional"])
def test_where_the_loops_mean_something_else_they_are_left_alone(part):
    """What comes later would be seen, and waves would not wait for it."""
    codec = loud("mbt2018")
    net = codec.net
    if part == "mask":
        net.context_prediction.mask[:, :, 2, 2] = 1  # the pixel itself
    elif part == "kind of convolution":
        net.context_prediction = CheckerboardMaskedConv2d(24, 48, 5, padding=2)
    else:
        net.gaussian_conditional = OtherRows(None)
        net.update()
    y_hat, params = nn.functional.pad(torch.randn(1, 24, 4, 6), (2, 2, 2, 2)), torch.randn(1, 48, 4, 6)
    with torch.no_grad():
        expected = net._compress_ar(y_hat.clone(), params, 4, 6, 5, 2)
        with coding.coding() as tally:
            assert net._compress_ar(y_hat.clone(), params, 4, 6, 5, 2) == expected
    assert tally.loops == []


class OwnLoop(JointAutoregressiveHierarchicalPriors):
    def _compress_ar(self, *arguments):
        return own(self, *arguments)


def own(net, y_hat, params, height, width, kernel_size, padding):
    """A stranger's loop: only its way to the same symbols is their own."""
    context = raster.Context(net.context_prediction, net.entropy_parameters, net.gaussian_conditional)
    encoder = coding.Encoder()
    raster.encode_pixels(encoder, y_hat, params, context, coding.tables_of(net.gaussian_conditional))
    return encoder.flush()


def test_a_strangers_own_loop_is_used_and_said_to_be_slow():
    net = OwnLoop(16, 24)
    net.load_state_dict(loud("mbt2018").net.state_dict(), strict=False)
    net.update(force=True)
    codec = Codec(net, CodecSpec(name="own", architecture="own:loop")).prepare()
    with pytest.warns(UserWarning, match="own: OwnLoop codes its context model by a loop of its own"):
        codec.compress(natural(3, 64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loud("mbt2018").compress(natural(3, 64, 64))
        tiny("cheng2020-anchor-checkerboard").compress(natural(3, 64, 64))


@pytest.mark.parametrize("table", [[0.11, 0.5, 1.0, 4.0, 64.0], [4.0, 0.5, 1.0, 0.11, 64.0]], ids=["rising", "not"])
def test_rows_are_compressais(table):
    conditional = GaussianConditional([0.11, 0.5, 1.0, 4.0, 64.0])
    conditional.scale_table.copy_(torch.tensor(table))
    ends = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 0.11, 0.5, 1.0, 4.0, 64.0, 65.0])
    near = torch.nextafter(conditional.scale_table, torch.tensor(0.0))
    scales = torch.cat([ends, near, 10 ** torch.linspace(-2, 3, 500)]).reshape(2, 1, -1, 1)
    rows = raster.rows_by_search(conditional, scales)
    assert rows.dtype == torch.int32
    assert torch.equal(rows, conditional.build_indexes(scales))
