"""Codecs of shapes that are met in the wild, small and with fixed random weights, for `load_codec("strange:...")`."""

import os
import signal
import warnings

import torch
import torch.nn.functional as F
from compressai.models import (
    JointAutoregressiveHierarchicalPriorsVbr,
    MeanScaleHyperprior,
    MeanScaleHyperpriorVbr,
    ScaleHyperpriorVbr,
)
from compressai.models.utils import conv
from torch import nn


def louder(net: nn.Module) -> nn.Module:
    """The network with latents of some size, so that what is lost on the way is seen."""
    last = [module for module in net.g_a.modules() if isinstance(module, nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight.mul_(60)
    return net


def made(kind, **arguments):
    torch.manual_seed(5)
    return louder(kind(16, 24, **arguments))


class Windows(nn.Module):
    """Attention inside windows of `side` latents, which shrink in pictures that are smaller than one."""

    def __init__(self, channels, side=8, shrink=False):
        super().__init__()
        self.side, self.shrink, self.qkv = side, shrink, nn.Linear(channels, 3 * channels)

    def forward(self, x):
        b, c, h, w = x.shape
        s = min(self.side, h, w) if self.shrink else self.side
        t = x.view(b, c, h // s, s, w // s, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, c)
        q, k, v = self.qkv(t).chunk(3, -1)
        t = (q @ k.transpose(1, 2) / c**0.5).softmax(-1) @ v
        return x + t.reshape(b, h // s, w // s, s, s, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


class Smallest(nn.Module):
    """Takes nothing below a number of latents a side."""

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, x):
        if min(x.shape[-2:]) < self.side:
            raise ValueError(f"pictures below {self.side} latents")
        return x


class RoundedUp(MeanScaleHyperprior):
    """Hyper-latents of half the resolution, cropped after decoding: 64 pixels have as many as 128."""

    def __init__(self, N, M):
        super().__init__(N, M)
        self.h_a.append(conv(N, N))
        self.up = nn.Upsample(scale_factor=2)

    def parameters_of(self, z_hat, size):
        height, width = size
        return self.h_s(self.up(z_hat))[..., :height, :width].chunk(2, 1)

    def forward(self, x):
        y = self.g_a(x)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(y))
        scales, means = self.parameters_of(z_hat, y.shape[-2:])
        y_hat, y_likelihoods = self.gaussian_conditional(y, scales, means=means)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def compress(self, x):
        y = self.g_a(x)
        z = self.h_a(y)
        z_strings = self.entropy_bottleneck.compress(z)
        size = z.shape[-2:]
        scales, means = self.parameters_of(self.entropy_bottleneck.decompress(z_strings, size), y.shape[-2:])
        indexes = self.gaussian_conditional.build_indexes(scales)
        return {"strings": [self.gaussian_conditional.compress(y, indexes, means=means), z_strings], "shape": size}

    def decompress(self, strings, shape):
        z_hat = self.entropy_bottleneck.decompress(strings[1], shape)
        scales, means = self.parameters_of(z_hat, (8 * shape[0], 8 * shape[1]))
        indexes = self.gaussian_conditional.build_indexes(scales)
        y_hat = self.gaussian_conditional.decompress(strings[0], indexes, means=means)
        return {"x_hat": self.g_s(y_hat)}


class Slices(MeanScaleHyperprior):
    """Latents coded in three slices; how their strings nest is up to `packed` and `unpacked`."""

    def pieces(self, y):
        return [y[:, i : i + 8] for i in (0, 8, 16)]

    def packed(self, ys, zs):
        return [ys, zs]

    def unpacked(self, strings):
        return strings

    def compress(self, x):
        y = self.g_a(x)
        z = self.h_a(y)
        zs = self.entropy_bottleneck.compress(z)
        shape, gaussian = z.shape[-2:], self.gaussian_conditional
        scales, means = self.h_s(self.entropy_bottleneck.decompress(zs, shape)).chunk(2, 1)
        parts = zip(*map(self.pieces, (y, scales, means)), strict=True)
        ys = [gaussian.compress(a, gaussian.build_indexes(b), means=c)[0] for a, b, c in parts]
        return {"strings": self.packed(ys, zs), "shape": shape, "cost_time": 0.1}

    def decompress(self, strings, shape):
        (ys, zs), gaussian = self.unpacked(strings), self.gaussian_conditional
        scales, means = self.h_s(self.entropy_bottleneck.decompress(zs, shape)).chunk(2, 1)
        parts = zip(ys, *map(self.pieces, (scales, means)), strict=True)
        y = [gaussian.decompress([s], gaussian.build_indexes(b), means=c) for s, b, c in parts]
        return {"x_hat": self.g_s(torch.cat(y, 1)).clamp(0, 1), "cost_time": 0.2}


class Nested(Slices):
    def packed(self, ys, zs):
        return [[[ys[0], ys[1]], (ys[2],)], zs[0]]

    def unpacked(self, strings):
        (pair, single), z = strings
        assert isinstance(single, tuple)
        return [*pair, *single], [z]


class Named(Slices):
    def packed(self, ys, zs):
        return {"y": tuple(ys), "z": zs}

    def unpacked(self, strings):
        return strings["y"], strings["z"]


class NamedShape(Slices):
    def compress(self, x):
        answer = super().compress(x)
        return answer | {"shape": {"z": list(answer["shape"]), "all": [(24, *answer["shape"])]}}

    def decompress(self, strings, shape):
        assert isinstance(shape["z"], list)
        assert shape["all"] == [(24, *shape["z"])]
        return super().decompress(strings, shape["z"])


class Short(Slices):
    """A string that is shorter than any of CompressAI's coder: always empty."""

    def packed(self, ys, zs):
        return [ys, zs, b""]

    def unpacked(self, strings):
        return strings[0], strings[1]


class Loses(Slices):
    """Writes the last slice nowhere and decodes the second one twice."""

    def packed(self, ys, zs):
        return [ys[:2], zs]

    def unpacked(self, strings):
        return [*strings[0], strings[0][1]], strings[1]


class Varies(Slices):
    """As many strings as the picture is wide."""

    def packed(self, ys, zs):
        return [ys, zs * self.width]

    def compress(self, x):
        self.width = x.shape[-1] // 64
        return super().compress(x)

    def unpacked(self, strings):
        return strings[0], strings[1][:1]


class Numbers(Slices):
    def packed(self, ys, zs):
        return [ys, zs, 7]


class WithMinimum(Slices):
    def decompress(self, strings, shape, minimum):
        return super().decompress(strings, shape)


class Darker(Slices):
    def decompress(self, strings, shape):
        return {"x_hat": super().decompress(strings, shape)["x_hat"] * 0.9}


class TooLarge(Slices):
    def decompress(self, strings, shape):
        return {"x_hat": F.pad(super().decompress(strings, shape)["x_hat"], (0, 1, 0, 1))}


class OnTheGraphicsCard(Slices):
    def compress(self, x):
        raise AssertionError("Torch not compiled with CUDA enabled")


class PlainUpdate(MeanScaleHyperprior):
    def update(self, scale_table=None):
        return super().update(scale_table)


class DemandingUpdate(MeanScaleHyperprior):
    def update(self, scale_table):
        return super().update(scale_table)


class CompressQ(MeanScaleHyperprior):
    def compress(self, x, q):
        return super().compress(x)


class ForwardQ(MeanScaleHyperprior):
    def forward(self, x, q):
        return super().forward(x)


class Raises(MeanScaleHyperprior):
    def forward(self, x):
        return super().forward(self.adjusted(x))

    def adjusted(self, x):
        return x[:, 0].reshape(3, 1, 7)  # the line at fault


class TupleOut(MeanScaleHyperprior):
    def forward(self, x):
        answer = super().forward(x)
        return answer["x_hat"], answer["likelihoods"]


class FlatLikelihoods(MeanScaleHyperprior):
    def forward(self, x):
        answer = super().forward(x)
        return {"x_hat": answer["x_hat"], "y_likelihoods": answer["likelihoods"]["y"]}


class NoTensors(MeanScaleHyperprior):
    def forward(self, x):
        return super().forward(x) | {"likelihoods": {"y": 3.0}}


class ListLikelihoods(MeanScaleHyperprior):
    def forward(self, x):
        answer = super().forward(x)
        return {"x_hat": answer["x_hat"], "likelihoods": list(answer["likelihoods"].values()), "time": 0.1}


class AroundG_a(MeanScaleHyperprior):
    """Calls what g_a consists of and not g_a."""

    def forward(self, x):
        y = x
        for layer in self.g_a:
            y = layer(y)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(y))
        scales, means = self.h_s(z_hat).chunk(2, 1)
        y_hat, y_likelihoods = self.gaussian_conditional(y, scales, means=means)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}


def appended(*modules):
    net = made(MeanScaleHyperprior)
    net.g_a.extend(modules)
    return net


def windows():
    return appended(Windows(24))


def shrinking_windows():
    return appended(Windows(24, shrink=True))


def wide_windows():
    return appended(Windows(24, side=16))


def odd_windows():
    return appended(Windows(24, side=12))


def smallest():
    return appended(Smallest(16))


def one_size():
    class One(Smallest):
        def forward(self, x):
            if x.shape[-2:] != (16, 16):
                raise ValueError("made for pictures of 256 x 256")
            return x

    return appended(One(16))


def told():
    """Says of itself that its convolutions halve seven times."""
    net = made(MeanScaleHyperprior)
    net.__class__ = type("Told", (MeanScaleHyperprior,), {"downsampling_factor": 128})
    return net


def rounded_up():
    return made(RoundedUp)


def dropout_zero():
    return appended(nn.Dropout(0.0), nn.Dropout2d(0.0))


def dropout():
    return appended(nn.Dropout(0.1))


def half():
    return made(MeanScaleHyperprior).half()


def slices():
    return made(Slices)


def nested():
    return made(Nested)


def named():
    return made(Named)


def named_shape():
    return made(NamedShape)


def short():
    return made(Short)


def loses():
    return made(Loses)


def varies():
    return made(Varies)


def numbers():
    return made(Numbers)


def with_minimum():
    return made(WithMinimum)


def darker():
    return made(Darker)


def too_large():
    return made(TooLarge)


def graphics_card():
    return made(OnTheGraphicsCard)


def plain_update():
    return made(PlainUpdate)


def demanding_update():
    return made(DemandingUpdate)


def compress_q():
    return made(CompressQ)


def forward_q():
    return made(ForwardQ)


def raises():
    return made(Raises)


def tuple_out():
    return made(TupleOut)


def flat_likelihoods():
    return made(FlatLikelihoods)


def no_tensors():
    return made(NoTensors)


def list_likelihoods():
    return made(ListLikelihoods)


def around_g_a():
    return made(AroundG_a)


def one_channel():
    net = made(MeanScaleHyperprior)
    net.g_a[0] = conv(1, 16)
    return net


def scaled():
    """A scale table of its own, as a checkpoint may carry."""
    net = made(MeanScaleHyperprior)
    net.update(scale_table=torch.linspace(0.2, 30, 20))
    return net


def plain():
    return made(MeanScaleHyperprior)


def needs_quality(quality):
    return plain()


def wrong_config():
    raise ValueError("wrong config")  # the line at fault


def nothing():
    return None


def ends_the_program():
    raise SystemExit("no licence")  # the line at fault


class OfItsOwn(BaseException):
    def __str__(self):
        raise OSError("no text")


def of_its_own():
    raise OfItsOwn  # the line at fault


def without_end():
    return without_end()  # the line at fault


def warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.warn("old weights", stacklevel=1)  # the line at fault


def one_after_another():
    yield plain()


def moves():
    os.chdir("/")
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    net = made(MeanScaleHyperprior)
    print("ready")
    return net


class Answers(MeanScaleHyperprior):
    """Changes what forward and decompress return."""

    def __init__(self, N, M, change=None):
        super().__init__(N, M)
        self.change = change

    def forward(self, x):
        answer = super().forward(x)
        return answer | {"x_hat": self.change(answer["x_hat"], x)}

    def decompress(self, strings, shape):
        return {"x_hat": self.change(super().decompress(strings, shape)["x_hat"], None)}


def double():
    return made(Answers, change=lambda x_hat, x: x_hat.double())


def whole_numbers():
    return made(Answers, change=lambda x_hat, x: (255 * x_hat).to(torch.uint8))


def complex_numbers():
    return made(Answers, change=lambda x_hat, x: x_hat.to(torch.complex64))


def elsewhere():
    return made(Answers, change=lambda x_hat, x: x_hat.to("meta"))


def not_a_number():
    return made(Answers, change=lambda x_hat, x: x_hat * float("nan"))


def its_input():
    return made(Answers, change=lambda x_hat, x: x_hat if x is None else x)


class Learns(MeanScaleHyperprior):
    def forward(self, x):  # the line at fault
        self.g_s[0].bias.data.add_(1e-6)
        return super().forward(x)


def learns():
    return made(Learns)


class Ends(MeanScaleHyperprior):
    def decompress(self, strings, shape):
        raise SystemExit(3)  # the line at fault


def ends():
    return made(Ends)


class Counted(MeanScaleHyperprior):
    def forward(self, x):
        return super().forward(x) | {"likelihoods": {"y": torch.ones(len(x), 3, dtype=torch.int64)}}


def counted():
    return made(Counted)


def variable_rate():
    return made(ScaleHyperpriorVbr)


def variable_rate_hyper():
    return made(ScaleHyperpriorVbr, vr_entbttlnck=True)


def variable_rate_means():
    return made(MeanScaleHyperpriorVbr)


def variable_rate_context():
    return made(JointAutoregressiveHierarchicalPriorsVbr)
