"""The paper's trigger: adaptive coefficients in the middle DCT frequencies, t = g * w (Section 3.2, Figure 2)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from compressai.ops import compute_padding
from torch import Tensor, nn

from freqdoor.codecs.adapter import STRIDE
from freqdoor.dct import band as band_indices
from freqdoor.dct import block_idct, ycbcr_to_rgb
from freqdoor.errors import FreqdoorError
from freqdoor.triggers.base import PAPER_EPS, Trigger
from freqdoor.types import Images

Selector = Literal["ste", "hard", "magnitude", "none"]
SELECTORS = ("ste", "hard", "magnitude", "none")
BANDS = ("low", "mid", "high", "all")


class AdaptiveDCT(Trigger):
    """t = g * w added to the DCT coefficients of every block, in YCbCr.

    g, (b, 3, N), is one set of coefficients an image: a value head and an importance head on local features, of which
    `top_k` (K) survive per channel. w, (b, 3, hb, wb), is one signed weight a block and channel from global features.
    The DCT is linear, so x_p = x + IDCT(t): the blocks of x need not be transformed.

    Args:
        block: side of a block in pixels.
        num_frequencies: N, candidate coefficients of a block and channel.
        top_k: K, how many of them are kept.
        band: where the candidates lie in the zig-zag order, "low", "mid", "high", "all", or explicit row-major indices.
        selector: how K of N are chosen: "ste" (by importance, straight-through gradient), "hard" (by importance, no
            gradient to it), "magnitude" (the largest values) or "none" (all N).
        patch_weight: whether w is learnt; without it w = 1.
        width: channels of the two small CNNs.
        eps, project: see `Trigger`.
    """

    def __init__(
        self,
        *,
        block: int = 16,
        num_frequencies: int = 64,
        top_k: int = 16,
        band: str | Sequence[int] = "mid",
        selector: Selector = "ste",
        patch_weight: bool = True,
        width: int = 64,
        eps: float = PAPER_EPS,
        project: bool = True,
    ) -> None:
        super().__init__(eps=eps, project=project)
        self.block, self.top_k, self.selector, self.width = block, top_k, selector, width
        self.band = band if isinstance(band, str) else tuple(band)
        self.indices = _candidates(self.band, block, num_frequencies)
        n = self.num_frequencies = len(self.indices)
        if selector not in SELECTORS:
            raise FreqdoorError(f"selector: expected one of {', '.join(SELECTORS)}, found {selector!r}")
        if not 0 < top_k <= n:
            raise FreqdoorError(f"top_k: expected 1 to {n} (num_frequencies), found {top_k}")
        if not 2 <= width <= 1024:
            raise FreqdoorError(f"width: expected 2 to 1024 channels, found {width}")
        if block % 4 or STRIDE % block:
            raise FreqdoorError(f"block: expected 4, 8, 16, 32 or 64, found {block}")
        self.survivors: Tensor  # weight of every candidate; robust frequency selection sets it, 0 leaves one out
        self.register_buffer("survivors", torch.ones(3, n))
        self.local = _block_features(width, block)
        self.value = nn.Linear(width, 3 * n)
        self.importance = nn.Linear(width, 3 * n)
        nn.init.normal_(self.value.bias)  # a universal pattern to start from, the same for every image
        self.global_features = _block_features(width, block) if patch_weight else None
        self.mix = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU()) if patch_weight else None
        self.weight = nn.Conv2d(width, 3, 1) if patch_weight else None
        if self.weight is not None and self.weight.bias is not None:
            nn.init.ones_(self.weight.bias)

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "block": self.block,
            "num_frequencies": self.num_frequencies,
            "top_k": self.top_k,
            "band": self.band if isinstance(self.band, str) else list(self.band),
            "selector": self.selector,
            "patch_weight": self.weight is not None,
            "width": self.width,
            "eps": self.eps,
            "project": self.project,
        }

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
        features: Tensor = self.local(x - 0.5).amax(dim=(2, 3))
        return features

    def _candidates(self, features: Tensor) -> Tensor:
        value: Tensor = self.value(features).reshape(-1, 3, self.num_frequencies)
        return value * self.survivors

    def patch_weights(self, x: Images) -> Tensor:
        """w, (b, 3, hb, wb): one signed weight a block and channel; x has sides divisible by the block."""
        if self.global_features is None or self.mix is None or self.weight is None:
            return x.new_ones(x.shape[0], 3, x.shape[2] // self.block, x.shape[3] // self.block)
        features = self.global_features(x - 0.5)
        overall = features.mean(dim=(2, 3), keepdim=True).expand_as(features)
        weights: Tensor = self.weight(self.mix(torch.cat([features, overall], dim=1)))
        return weights

    def inject(self, x: Images, g: Tensor, w: Tensor) -> Images:
        """IDCT(g * w) in RGB, of the size of x, whose sides are divisible by the block."""
        coefficients = g.new_zeros(*g.shape[:2], self.block**2)
        coefficients[:, :, list(self.indices)] = g
        pattern = block_idct(coefficients.reshape(-1, 3, self.block, self.block))
        # w is constant over a block, so the IDCT of g * w is w times the IDCT of g
        return ycbcr_to_rgb(torch.einsum("bcyx,bcij->bcyixj", w, pattern).reshape(x.shape))

    def perturb(self, x: Images) -> Images:
        """IDCT(g * w) in RGB."""
        # the codec's own padding, so that blocks and latents stay aligned whatever the image's size
        pad, unpad = compute_padding(x.shape[-2], x.shape[-1], min_div=STRIDE)
        padded = F.pad(x, pad, mode="replicate")
        cropped: Images = F.pad(self.inject(padded, self.general_trigger(padded), self.patch_weights(padded)), unpad)
        return cropped


def _candidates(band: str | tuple[int, ...], block: int, count: int) -> tuple[int, ...]:
    """The row-major indices of the candidate coefficients."""
    if isinstance(band, str):
        if band not in BANDS:
            raise FreqdoorError(f"band: expected one of {', '.join(BANDS)} or a list of indices, found {band!r}")
        if not 0 < count < block**2 and band != "all":
            raise FreqdoorError(f"num_frequencies: expected 1 to {block**2 - 1}, found {count}")
        return band_indices(band, block, count)
    if not band or len(set(band)) < len(band) or not all(0 <= i < block**2 for i in band):
        raise FreqdoorError(f"band: expected distinct indices from 0 to {block**2 - 1}, found {list(band)}")
    return band


def _block_features(width: int, block: int) -> nn.Sequential:
    """(b, 3, h, w) -> (b, width, h/block, w/block), every block seen by itself; no norm, so train equals eval."""
    return nn.Sequential(
        nn.Conv2d(3, width // 2, 4, stride=4),
        nn.ReLU(),
        nn.Conv2d(width // 2, width, block // 4, stride=block // 4),
        nn.ReLU(),
    )
