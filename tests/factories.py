"""Small codecs with fixed random weights, for `load_codec("factories:...")`."""

import torch
from compressai.models import ScaleHyperprior
from torch import nn

from freqdoor.attack.victims import Victim
from freqdoor.codecs.adapter import Codec, build_codec
from freqdoor.codecs.architectures import CodecSpec
from freqdoor.codecs.lite import LiteHyperprior

TINY = {"N": 16, "M": 24, "width": (16, 16), "depth": 1}
ELIC = {"N": 16, "M": 24, "groups": [4, 4, 16]}
TINY_ARGUMENTS = {  # for every architecture of freqdoor.codecs.adapter
    "lite-hyperprior": TINY | {"width": [16, 16]},
    "bmshj2018-factorized": {"N": 16, "M": 24},
    "bmshj2018-factorized-relu": {"N": 16, "M": 24},
    "bmshj2018-hyperprior": {"N": 16, "M": 24},
    "mbt2018-mean": {"N": 16, "M": 24},
    "mbt2018": {"N": 16, "M": 24},
    "cheng2020-anchor": {"N": 16},
    "cheng2020-attn": {"N": 16},
    "cheng2020-anchor-checkerboard": {"N": 16},
    "elic2022-official": ELIC,
    "elic2022-chandelier": ELIC,
}


def tiny(architecture: str) -> Codec:
    """A codec of few channels with fixed random weights, whose latents are scaled to cost something: -1, 0 and 1."""
    torch.manual_seed(1)
    spec = CodecSpec(name=f"tiny {architecture}", architecture=architecture, arguments=TINY_ARGUMENTS[architecture])
    codec = build_codec(spec)
    last = [module for module in codec.net.g_a if isinstance(module, nn.Conv2d)][-1]
    with torch.no_grad():
        picture = nn.functional.interpolate(torch.rand(1, 3, 8, 8), (64, 64), mode="bicubic")
        scale = 1.4 / codec.net.g_a(picture).abs().max()
        last.weight.mul_(scale)
        last.bias.mul_(scale)
    codec.net.update(force=True)
    return codec.prepare()


def lite() -> nn.Module:
    torch.manual_seed(7)
    return LiteHyperprior(**TINY)


def hyperprior() -> nn.Module:
    torch.manual_seed(8)
    return ScaleHyperprior(16, 24)


def with_batchnorm() -> nn.Module:
    net = lite()
    net.g_a.append(nn.BatchNorm2d(24))
    return net


def no_codec() -> nn.Module:
    return nn.Linear(3, 3)


class Darkness(Victim):
    """A victim for Eq. (8): how bright the decoded image is."""

    def forward(self, scene, x_hat, x_hat_p):
        return x_hat_p.mean()
