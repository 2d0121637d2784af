"""The paper's trigger: adaptive coefficients in the middle DCT frequencies, t = g * w (Section 3.2, Figure 2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqdoor.codecs.sides import padding
from freqdoor.dct import band as band_indices
from freqdoor.dct import block_idct, ycbcr_to_rgb
from freqdoor.parts import parts
from freqdoor.triggers.arguments import AdaptiveDCTArguments
from freqdoor.triggers.base import Trigger
from freqdoor.types import Images


class AdaptiveDCT(Trigger):
    """t = g * w added to the DCT coefficients of every block, in YCbCr.

    g, (b, 3, N), is one set of coefficients an image: a value head and an importance head on local features, of which
    `top_k` (K) survive per channel. w, (b, 3, hb, wb), is one signed weight a block and channel from global features.
    The DCT is linear, so x_p = x + IDCT(t): the blocks of x need not be transformed.

    Args:
        arguments: those of `AdaptiveDCTArguments`, by name.
    """

    def __init__(self, **arguments: Any) -> None:
        settings = AdaptiveDCTArguments(**arguments)
        super().__init__(settings)
        self.block, self.top_k, self.selector = settings.block, settings.top_k, settings.selector
        n = self.num_frequencies = settings.num_frequencies
        band, block, width = settings.band, settings.block, settings.width
        self.indices = band_indices(band, block, n) if isinstance(band, str) else band
        self.survivors: Tensor  # weight of every candidate; robust frequency selection sets it, 0 leaves one out
        self.register_buffer("survivors", torch.ones(3, n))
        self.local = _block_features(width, block)
        self.value = nn.Linear(width, 3 * n)
        self.importance = nn.Linear(width, 3 * n)
        nn.init.normal_(self.value.bias)  # a universal pattern to start from, the same for every image
        weighted = settings.patch_weight
        self.global_features = _block_features(width, block) if weighted else None
        self.mix = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU()) if weighted else None
        self.weight = nn.Conv2d(width, 3, 1) if weighted else None
        if self.weight is not None and self.weight.bias is not None:
            nn.init.ones_(self.weight.bias)

    def candidates(self, x: Images) -> Tensor:
        """The values of all N candidates, (b, 3, N), before K of them are selected."""
        return self._candidates(self._features(x))

    def general_trigger(self, x: Images) -> Tensor:
        """g, (b, 3, N): the kept coefficients of every image; x has sides divisible by the block."""
        features = self._features(x)
        value = self._candidates(features)
        if self.selector == "none":
            return value
        importance: Tensor = self.importance(features).reshape(-1, 3, self.num_frequencies)
        score = value.abs() if self.selector == "magnitude" else importance
        score = score.detach().masked_fill(self.survivors == 0, -torch.inf)
        kept = torch.zeros_like(value).scatter(2, score.topk(self.top_k, dim=2).indices, 1.0)
        if self.selector == "ste":
            soft = importance.sigmoid()
            kept = kept + soft - soft.detach()
        return value * kept

    def _features(self, x: Images) -> Tensor:
        return self._by_blocks(self.local, x).amax(dim=(2, 3))

    def _by_blocks(self, network: nn.Module, x: Images) -> Tensor:
        """The features of every block, (b, width, hb, wb), of so many rows at a time as fit the processor's cache."""
        features = [network(x[..., rows, :] - 0.5) for rows in parts(x.shape, self.block)]
        return features[0] if len(features) == 1 else torch.cat(features, -2)

    def _candidates(self, features: Tensor) -> Tensor:
        value: Tensor = self.value(features).reshape(-1, 3, self.num_frequencies)
        return value * self.survivors

    def patch_weights(self, x: Images) -> Tensor:
        """w, (b, 3, hb, wb): one signed weight a block and channel; x has sides divisible by the block."""
        if self.global_features is None or self.mix is None or self.weight is None:
            return x.new_ones(x.shape[0], 3, x.shape[2] // self.block, x.shape[3] // self.block)
        features = self._by_blocks(self.global_features, x)
        overall = features.mean(dim=(2, 3), keepdim=True).expand_as(features)
        weights: Tensor = self.weight(self.mix(torch.cat([features, overall], dim=1)))
        return weights

    def inject(self, x: Images, g: Tensor, w: Tensor) -> Images:
        """IDCT(g * w) in RGB, of the size of x, whose sides are divisible by the block."""
        coefficients = g.new_zeros(*g.shape[:2], self.block**2)
        coefficients[:, :, list(self.indices)] = g
        pattern = block_idct(coefficients.reshape(-1, 3, self.block, self.block))
        injected = []
        for rows in parts(x.shape, self.block):
            some = x[..., rows, :].shape
            # w is constant over a block, so the IDCT of g * w is w times the IDCT of g
            weights = w[..., rows.start // self.block : rows.stop // self.block, :]
            injected.append(ycbcr_to_rgb(torch.einsum("bcyx,bcij->bcyixj", weights, pattern).reshape(some)))
        return injected[0] if len(injected) == 1 else torch.cat(injected, -2)

    def perturb(self, x: Images) -> Images:
        """IDCT(g * w) in RGB."""
        # the codec's own padding, so that blocks and latents stay aligned whatever the image's size, and what is
        # missing to a whole block where the codec pads to less
        height, width = x.shape[-2:]
        (left, right, top, bottom), _ = padding(height, width, self.multiple)
        right += -(left + width + right) % self.block
        bottom += -(top + height + bottom) % self.block
        padded = F.pad(x, (left, right, top, bottom), mode="replicate")
        t = self.inject(padded, self.general_trigger(padded), self.patch_weights(padded))
        return t[..., top : top + height, left : left + width]


def _block_features(width: int, block: int) -> nn.Sequential:
    """(b, 3, h, w) -> (b, width, h/block, w/block), every block seen by itself; no norm, so train equals eval."""
    return nn.Sequential(
        nn.Conv2d(3, width // 2, 4, stride=4),
        nn.ReLU(),
        nn.Conv2d(width // 2, width, block // 4, stride=block // 4),
        nn.ReLU(),
    )
