"""The baseline LIRA: a U-Net draws the perturbation in pixels, T(x) = x + eps Normalize(U(x)) (Section 4)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqdoor.codecs.sides import padding
from freqdoor.errors import FreqdoorError
from freqdoor.limits import machine_memory, size_text
from freqdoor.metrics import rms
from freqdoor.triggers.arguments import LiraArguments
from freqdoor.triggers.base import Trigger
from freqdoor.types import Images

ALIVE = 8  # activations at the picture's resolution that are there at once: the peak, measured without gradients


class Lira(Trigger):
    """x + eps Normalize(U(x)): U is a U-Net, Normalize makes the root mean square of each image's output one.

    The output is normalised here, so that the equation holds without `project` too; `project` then makes up for what
    clamping, rounding and a mask change.

    Args:
        arguments: those of `LiraArguments`, by name.
    """

    def __init__(self, **arguments: Any) -> None:
        settings = LiraArguments(**arguments)
        super().__init__(settings)
        self.levels = settings.levels
        channels = [settings.width * 2**level for level in range(settings.levels)]
        finer, coarser = channels[:-1], channels[1:]
        self.down = nn.ModuleList(_two_convs(a, b) for a, b in zip([3, *finer], channels, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(finer, coarser, strict=True))
        self.merge = nn.ModuleList(_two_convs(2 * a, a) for a in finer)
        self.draw = nn.Conv2d(settings.width, 3, 1)

    def unet(self, x: Images) -> Tensor:
        """U(x), (b, 3, h, w); x has sides divisible by 2^(levels - 1)."""
        features = self.down[0](x - 0.5)
        skips = []
        for down in self.down[1:]:
            skips.append(features)
            features = down(F.max_pool2d(features, 2))
        for skip, up, merge in reversed(list(zip(skips, self.up, self.merge, strict=True))):
            features = merge(torch.cat([skip, up(features)], dim=1))
        drawn: Tensor = self.draw(features)
        return drawn

    def perturb(self, x: Images) -> Images:
        """Eps Normalize(U(x)).

        Raises:
            FreqdoorError: a picture that would take more memory than there is.
        """
        needed = x.shape[0] * x.shape[-2] * x.shape[-1] * self.draw.in_channels * x.element_size() * ALIVE
        if x.device.type == "cpu" and needed > (there := machine_memory()):
            raise FreqdoorError(
                "trigger lira: its layers normalise over the whole picture, so that one of "
                f"{x.shape[-1]}x{x.shape[-2]} cannot be taken in parts: it takes about {size_text(needed)} of memory, "
                f"and this machine has {size_text(there)}; crop the picture"
            )
        pad, unpad = padding(x.shape[-2], x.shape[-1], 2 ** (self.levels - 1))
        drawn = F.pad(self.unet(F.pad(x, pad, mode="replicate")), unpad)
        return self.eps * drawn / rms(drawn)


def _two_convs(before: int, after: int) -> nn.Sequential:
    """Two 3x3 convolutions; GroupNorm, since with batch statistics training and evaluation would attack differently."""
    groups = math.gcd(after // 2, 8)  # two channels or more in each: one channel of one pixel has no variance
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1),
        nn.GroupNorm(groups, after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1),
        nn.GroupNorm(groups, after),
        nn.ReLU(),
    )
