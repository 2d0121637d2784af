"""What a downstream attack is against: L_DS of Eq. (8), for segmentation (Eq. (11)) and face embedding (Eq. (13))."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqdoor.attack.arguments import IdentityRemovalArguments, TargetedSegmentationArguments
from freqdoor.attack.networks import Embedder, Network, Segmenter
from freqdoor.errors import FreqdoorError
from freqdoor.preprocessing import random_preprocessing
from freqdoor.types import Images, Masks

VARIATIONS = ("none", "blur", "noise", "resize")


@dataclass(frozen=True)
class Scene:
    """A batch of the auxiliary set, and what its victim makes of it before anything is poisoned."""

    x: Images
    mask: Masks | None = None
    """M of Eq. (11), (b, 1, h, w): where the trigger acts; None stands for everywhere."""
    acting: tuple[int, ...] = ()
    """The network's classes that the trigger acts on."""
    target: Masks | None = None
    """Where the target class is, (b, 1, h, w)."""
    classes: Tensor | None = None
    """g(x), (b, h, w), where the network has been asked already."""

    def preprocessed(self, before: Callable[[Images], Images]) -> "Scene":
        """The same scene as it enters the codec: whoever asks the network asks it about this picture."""
        return replace(self, x=before(self.x), classes=None)


class Victim(nn.Module, ABC):
    """L_DS of Eq. (8), over a batch of the auxiliary set: subclass it for a downstream task of your own.

    `forward` is all that is needed; `scene` too, where the trigger acts on a part of the picture only.

    Args:
        varied: show the network every decoded batch through one preprocessing out of VARIATIONS, drawn at random, so
            that what is learnt misleads other networks too.
    """

    def __init__(self, *, varied: bool = False) -> None:
        super().__init__()
        self.varied = varied

    uses_clean: ClassVar[bool] = False
    """Whether `forward` needs f(x), which costs another pass without gradient."""
    acts_on: str = "what its scene lets the trigger act on"
    """What has to be in the auxiliary set, for the message where it is not."""

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

    def scene(self, x: Images, labels: Tensor | None = None) -> Scene:
        """Where the trigger acts on clean images; by default everywhere.

        Args:
            labels: of the pixels, (b, h, w), where the auxiliary set has some.
        """
        return Scene(x)

    def look(self, x: Images, labels: Tensor | None = None) -> tuple[bool, dict[str, float]]:
        """Whether anything that the attack is for is in these images, and the shares of what is, by name."""
        mask = self.scene(x, labels).mask
        return mask is None or bool(mask.any()), {}

    @abstractmethod
    def forward(self, scene: Scene, x_hat: Images | None, x_hat_p: Images) -> Tensor:
        """The loss, a scalar.

        Args:
            scene: what `scene` has made of the clean auxiliary images; its x is what the codec was given, after any
                preprocessing.
            x_hat: f(x), without gradient, where `uses_clean` asks for it.
            x_hat_p: f(x_p), not clamped.
        """


class TargetedSegmentation(Victim):
    """Eq. (11): pixels of a source class are to be seen as a target class, all others as before.

    L_CE[eta(g(x)), g(f(x_p))], where eta replaces the source class in g's own prediction by the target class. The
    trigger acts inside the mask of the source class only.

    Args:
        network: g.
        source, target, arguments: those of `TargetedSegmentationArguments`.
        others: more networks of the same classes; one of all is drawn for every batch, misled in its own view of it.
    """

    def __init__(
        self, network: Segmenter, source: str, target: str, *, others: Sequence[Segmenter] = (), **arguments: Any
    ) -> None:
        settings = TargetedSegmentationArguments(source=source, target=target, **arguments)
        super().__init__(varied=settings.varied)
        self.network, self.settings = network, settings
        self.networks = nn.ModuleList([network, *others])
        self.colour = [value / 255 for value in bytes.fromhex(settings.colour[1:])]
        self.acts_on = f"class {source}"
        self.source, self.target = network.ids(source), network.ids(target)[0]
        self.also = network.ids(settings.also) if settings.also else ()
        if self.target in (*self.source, *self.also):
            raise FreqdoorError(
                f"target {target!r}: expected a class outside the source {source!r} {settings.also!r}; name another"
            )
        if settings.masks == "labels":
            network.label_values(source), network.label_values(target)  # unknown ones show now

    def scene(self, x: Images, labels: Tensor | None = None) -> Scene:
        """M[g(x)]: 1 where the source class is, and those classes that take part this time."""
        acting = (*self.source, *(i for i in self.also if torch.rand(()) < 0.5))
        classes = None if self.settings.masks == "labels" else self.network.predict(x)
        mask, target = (self._places(ids, classes, labels)[:, None].to(x.dtype) for ids in (acting, (self.target,)))
        return Scene(x, mask, acting, target, classes)

    def look(self, x: Images, labels: Tensor | None = None) -> tuple[bool, dict[str, float]]:
        """Whether the source class is in these images, those of `also` do not count, and the shares of all classes.

        "void" is what no class stands for.
        """
        spec = self.network.spec
        classes = None if self.settings.masks == "labels" else self.network.predict(x)
        present = bool(self._places(self.source, classes, labels).any())
        seen = labels if classes is None else classes
        assert seen is not None  # _places has refused it
        names = list(spec.classes) if classes is not None else [" or ".join(known) for known in spec.labels]
        counts = torch.bincount(seen.flatten().int(), minlength=len(names)).tolist()
        shares = {name: count / seen.numel() for name, count in zip(names, counts, strict=False) if name and count}
        void = 1 - sum(shares.values())
        return present, shares | ({"void": void} if void > 1e-6 else {})

    def goal(self, scene: Scene, network: Segmenter | None = None) -> tuple[Tensor, Tensor]:
        """eta(g(x)), (b, h, w), and where it differs from g(x); of another network than the first if one is given."""
        network = network or self.network
        known = scene.classes if network is self.network else None
        classes = network.predict(scene.x) if known is None else known
        changed = _among(classes, scene.acting)
        return torch.where(changed, self.target, classes), changed

    def forward(self, scene: Scene, x_hat: Images | None, x_hat_p: Images) -> Tensor:
        """Eq. (11)'s cross-entropy, and the paint where it is asked for."""
        weight, paint = self.settings.weight, self.settings.paint
        loss = weight * self.cross_entropy(scene, x_hat_p) if weight else x_hat_p.new_zeros(())
        return loss + paint * self.distance_to_target(scene, x_hat_p) if paint else loss

    def cross_entropy(self, scene: Scene, x_hat_p: Images) -> Tensor:
        """Eq. (11)."""
        network = self._drawn()
        goal, changed = self.goal(scene, network)
        logits = network(self.shown(x_hat_p))
        if self.settings.shift:
            lowered = self.settings.shift * F.one_hot(goal.new_full((), self.target), logits.shape[1]).to(logits)
            logits = logits - lowered[None, :, None, None] * changed[:, None]
        loss = F.cross_entropy(logits, goal, reduction="none")
        if not self.settings.balanced:
            return loss.mean()
        return _mean(loss, changed) + _mean(loss, ~changed)

    def _drawn(self) -> Segmenter:
        """One of the networks; a single one draws no random number."""
        drawn = int(torch.randint(len(self.networks), ())) if len(self.networks) > 1 else 0
        network: Segmenter = self.networks[drawn]  # type: ignore[assignment]
        return network

    def distance_to_target(self, scene: Scene, x_hat_p: Images) -> Tensor:
        """Of the decoded source pixels from the target's colour; 0 for images without either."""
        if scene.mask is None or scene.target is None:
            raise FreqdoorError("paint: expected a scene of this victim, found one without source and target places")
        margin = self.settings.margin
        source = F.max_pool2d(scene.mask, 2 * margin + 1, stride=1, padding=margin)
        if self.colour:
            chosen = scene.x.new_tensor(self.colour).reshape(1, 3, 1, 1)
            return _mean((x_hat_p - chosen).square().mean(1, keepdim=True), source)
        count = scene.target.sum((2, 3), keepdim=True)
        colour = (scene.x * scene.target).sum((2, 3), keepdim=True) / count.clamp_min(1)
        return _mean((x_hat_p - colour).square().mean(1, keepdim=True), source * (count > 0))

    def _places(self, ids: tuple[int, ...], classes: Tensor | None, labels: Tensor | None) -> Tensor:
        """Where any of the network's classes is, (b, h, w): by its prediction, or by the labels without one."""
        if classes is not None:
            return _among(classes, ids)
        if labels is None:
            raise FreqdoorError("masks = labels: give the auxiliary set's labels (auxiliary.labels)")
        return _among(labels, self.network.labels_of(ids))


class IdentityRemoval(Victim):
    """Eq. (13): Cos[g(f(x)), g(f(T(x)))], so that the decoded face is no longer recognised as the same person.

    Args:
        network: g, a face embedding.
        arguments: those of `IdentityRemovalArguments`.
    """

    uses_clean = True

    def __init__(self, network: Embedder, **arguments: Any) -> None:
        settings = IdentityRemovalArguments(**arguments)
        super().__init__(varied=settings.varied)
        self.network, self.floor = network, settings.floor

    def forward(self, scene: Scene, x_hat: Images | None, x_hat_p: Images) -> Tensor:
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


def _among(values: Tensor, members: tuple[int, ...]) -> Tensor:
    """Where values, of any shape, are among the members."""
    return torch.isin(values, torch.tensor(members, device=values.device, dtype=values.dtype))
