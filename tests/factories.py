"""Small codecs with fixed random weights, for `load_codec("factories:...")`."""

import torch
from compressai.models import ScaleHyperprior
from torch import nn

from freqdoor.lite import LiteHyperprior

TINY = {"N": 16, "M": 24, "width": (16, 16), "depth": 1}


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


def darkness():
    """A victim for Eq. (8): how bright the decoded image is."""
    return lambda source, x_hat_p: x_hat_p.mean()
