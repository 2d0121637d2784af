"""What a downstream attack is against: L_DS of Eq. (8), for segmentation (Eq. (11)) and face embedding (Eq. (13))."""

import re
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqdoor.attack.networks import Embedder, Network, Segmenter
from freqdoor.errors import FreqdoorError
from freqdoor.preprocessing import random_preprocessing
from freqdoor.types import Images, Masks

VARIATIONS = ("none", "blur", "noise", "resize")


class Victim(nn.Module, ABC):
    """L_DS of Eq. (8), over a batch of the auxiliary set: subclass it for a downstream task of your own.

    Args:
        varied: show the network every decoded batch through one preprocessing out of VARIATIONS, drawn at random, so
            that what is learnt misleads other networks too.
    """

    def __init__(self, *, varied: bool = False) -> None:
        super().__init__()
        self.varied = varied

    uses_clean: ClassVar[bool] = False
    """Whether `forward` needs f(x), which costs another pass without gradient."""

    def shown(self, x_hat_p: Images) -> Images:
        """What the network is shown of f(x_p), in [0, 1]."""
        x_hat_p = x_hat_p.clamp(0, 1)
        variation = random_preprocessing(VARIATIONS) if self.varied else None
        return variation(x_hat_p) if variation else x_hat_p

    def run_in(self, precision: torch.dtype) -> None:
        """Let all downstream networks inside compute in this precision."""
        for module in self.modules():
            if isinstance(module, Network):
                module.precision = precision

    def mask(self, x: Images, labels: Tensor | None = None) -> Masks | None:
        """M of Eq. (11), (b, 1, h, w): where the trigger may act on x; None stands for everywhere."""
        return None

    @abstractmethod
    def forward(self, x: Images, x_hat: Images | None, x_hat_p: Images) -> Tensor:
        """The loss, a scalar.

        Args:
            x: clean auxiliary images.
            x_hat: f(x), without gradient, where `uses_clean` asks for it.
            x_hat_p: f(x_p), not clamped.
        """


class TargetedSegmentation(Victim):
    """Eq. (11): pixels of a source class are to be seen as a target class, all others as before.

    L_CE[eta(g(x)), g(f(x_p))], where eta replaces the source class in g's own prediction by the target class. The
    trigger acts inside the mask of the source class only.

    Args:
        network: g.
        source, target: classes of the network or groups of its spec; of a group, the target is its first class.
        also: while training, each batch is one of the source class together with these classes or groups, each of
            which takes part every second time: a class that covers a twentieth of the picture teaches little.
        masks: where the source class is, by the network's prediction (the paper) or by the data set's labels.
        balanced: mean over the source pixels + mean over the others, instead of over all: a class that covers a
            twentieth of the picture else counts a twentieth.
        shift: boundary shift: the target's logit is lowered by so much at source pixels, so that the attack has to
            go beyond the boundary of this network, and with it of others.
        weight: of the cross-entropy; with 0, and masks from labels, no network is asked in training at all.
        paint: weight of the mean squared distance of decoded source pixels, in [0, 1], from `colour`: what looks like
            the target misleads networks that were not trained against.
        margin: pixels around the source that are painted too: an outline that is left still looks like the source.
        colour: as "#rrggbb"; by default the mean colour of the picture's target pixels.
        varied: see `Victim`.
    """

    def __init__(
        self,
        network: Segmenter,
        source: str,
        target: str,
        *,
        also: str = "",
        masks: Literal["network", "labels"] = "network",
        balanced: bool = True,
        shift: float = 0.0,
        weight: float = 1.0,
        paint: float = 0.0,
        margin: int = 0,
        colour: str = "",
        varied: bool = False,
    ) -> None:
        super().__init__(varied=varied)
        if masks not in ("network", "labels"):
            raise FreqdoorError(f"masks: expected network or labels, found {masks!r}")
        self.network, self.masks, self.balanced = network, masks, balanced
        self.shift, self.weight, self.paint, self.margin = shift, weight, paint, int(margin)
        if colour and not re.fullmatch("#[0-9a-fA-F]{6}", colour):
            raise FreqdoorError(f"colour: expected #rrggbb or nothing, found {colour!r}")
        self.colour = [value / 255 for value in bytes.fromhex(colour[1:])]
        self.source, self.target = network.ids(source), network.ids(target)[0]
        self.also = network.ids(also) if also else ()
        if self.target in (*self.source, *self.also):
            raise FreqdoorError(f"target {target!r}: expected a class outside the source {source!r} {also!r}")
        if masks == "labels":
            network.label_values(source), network.label_values(target)  # unknown ones show now
        self.acting = self.source  # on which classes the trigger acts in the current batch
        self._seen: tuple[Images, Tensor] | None = None
        self._places: tuple[Images, Masks, Masks] | None = None  # where source and target are in a batch

    def mask(self, x: Images, labels: Tensor | None = None) -> Masks:
        """M[g(x)]: 1 where the source class is, and those that take part this time."""
        if self.masks == "labels" and labels is None:
            raise FreqdoorError("masks = labels: give the auxiliary set's labels (auxiliary.labels)")
        self.acting = (*self.source, *(i for i in self.also if torch.rand(()) < 0.5))
        wanted: tuple[tuple[int, ...], tuple[int, ...]] = (self.acting, (self.target,))
        if self.masks == "labels" and labels is not None:
            classes, wanted = labels, (self.network.labels_of(wanted[0]), self.network.labels_of(wanted[1]))
        else:
            classes = self.seen(x)
        source, target = (_among(classes, values)[:, None].to(x.dtype) for values in wanted)
        self._places = (x, source, target)
        return source

    def seen(self, x: Images) -> Tensor:
        """g(x), (b, h, w), kept for the batch that was asked for last: mask and goal both need it."""
        if self._seen is None or self._seen[0] is not x:
            self._seen = (x, self.network.predict(x))
        return self._seen[1]

    def goal(self, x: Images) -> tuple[Tensor, Tensor]:
        """eta(g(x)), (b, h, w), and where it differs from g(x)."""
        seen = self.seen(x)
        changed = _among(seen, self.acting)
        return torch.where(changed, self.target, seen), changed

    def forward(self, x: Images, x_hat: Images | None, x_hat_p: Images) -> Tensor:
        """Eq. (11)'s cross-entropy, and the paint where it is asked for."""
        loss = self.weight * self.cross_entropy(x, x_hat_p) if self.weight else x_hat_p.new_zeros(())
        return loss + self.paint * self.distance_to_target(x, x_hat_p) if self.paint else loss

    def cross_entropy(self, x: Images, x_hat_p: Images) -> Tensor:
        """Eq. (11)."""
        wanted, changed = self.goal(x)
        logits = self.network(self.shown(x_hat_p))
        if self.shift:
            lowered = self.shift * F.one_hot(wanted.new_full((), self.target), logits.shape[1]).to(logits)
            logits = logits - lowered[None, :, None, None] * changed[:, None]
        loss = F.cross_entropy(logits, wanted, reduction="none")
        if not self.balanced:
            return loss.mean()
        return _mean(loss, changed) + _mean(loss, ~changed)

    def distance_to_target(self, x: Images, x_hat_p: Images) -> Tensor:
        """Of the decoded source pixels from the target's colour; 0 for images without either."""
        if self._places is None or self._places[0] is not x:
            raise FreqdoorError("paint: ask for the mask of this batch first")
        _, source, target = self._places
        source = F.max_pool2d(source, 2 * self.margin + 1, stride=1, padding=self.margin)
        if self.colour:
            wanted = x.new_tensor(self.colour).reshape(1, 3, 1, 1)
            return _mean((x_hat_p - wanted).square().mean(1, keepdim=True), source)
        count = target.sum((2, 3), keepdim=True)
        colour = (x * target).sum((2, 3), keepdim=True) / count.clamp_min(1)
        return _mean((x_hat_p - colour).square().mean(1, keepdim=True), source * (count > 0))


class IdentityRemoval(Victim):
    """Eq. (13): Cos[g(f(x)), g(f(T(x)))], so that the decoded face is no longer recognised as the same person.

    Args:
        network: g, a face embedding.
        floor: no reward for a cosine below it: 0 is what two different persons have.
        varied: see `Victim`.
    """

    uses_clean = True

    def __init__(self, network: Embedder, *, floor: float = -1.0, varied: bool = False) -> None:
        super().__init__(varied=varied)
        self.network, self.floor = network, floor

    def forward(self, x: Images, x_hat: Images | None, x_hat_p: Images) -> Tensor:
        """Eq. (13)'s cosine, mean over the batch."""
        if x_hat is None:
            raise FreqdoorError("identity removal compares with the decoded clean picture, and got none")
        with torch.no_grad():
            identity = self.network(x_hat.clamp(0, 1))
        cosine: Tensor = (identity * self.network(self.shown(x_hat_p))).sum(1)
        return cosine.clamp_min(self.floor).mean()


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the values at the places that are not 0; 0 if there are none."""
    weights = where.to(values)
    return (values * weights).sum() / weights.sum().clamp_min(1)


def _among(values: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Where values, of any shape, are among the wanted ones."""
    return torch.isin(values, torch.tensor(wanted, device=values.device, dtype=values.dtype))
