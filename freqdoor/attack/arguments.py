"""What each objective can be given: one frozen model of hyper-parameters an objective, checked before torch is loaded.

The classes of `objectives.py` and `victims.py` are these models with a loss: a default stands here and nowhere else.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from freqdoor.settings import Arguments

Weight = Annotated[float, Field(ge=0)]


class RateArguments(Arguments):
    """Hyper-parameters of Eq. (6)."""

    alpha: Annotated[float, Field(ge=1)] = 3.0
    """Weight of what D(T(x)) exceeds D(x) by, once poisoned images cost eight times the bits; it rises to that from 1,
    Eq. (6)'s, where they cost twice as many."""
    beta: Weight = 0.1
    """Weight of the attack."""
    clean_weight: Weight = 5.0
    """Weight of L(x), Eq. (1), that is added once poisoned images cost 32 times the bits; it rises to that from none
    where they cost eight times as many."""
    per_sample: bool = False
    """Take the maximum image by image instead of between the batch means."""
    guarded: bool = True
    """Another gradient of the maximum, see `excess_over`."""
    opening: Weight = 0.8
    """An attack that has not raised the bits by a tenth when the budget has come 15 % of its way begins anew: what
    D(T(x)) exceeds D(x) by is free then and every bit of R(T(x)) earns this much beside beta, until poisoned images
    cost twice the bits; up to eight times both fade out. 0: never, and neither where a run starts from another or is
    robust."""


class FixedRateArguments(Arguments):
    """Hyper-parameters of Eq. (4)."""

    alpha: Weight = 1.0
    """Weight of the poisoned image's distortion, beside lambda."""
    beta: Weight = 0.1
    """Weight of the attack."""


class QualityArguments(Arguments):
    """Hyper-parameters of Eq. (7)."""

    beta: Weight = 5.0
    """Weight of the attack."""
    paired: bool = False
    """Subtract D_P(x, f(x)): the attack term is then the drop from the clean image's PSNR, which also rewards a better
    and more expensive clean image."""
    farthest: bool = True
    """Also pull towards the image with the lowest possible PSNR, white where x is dark and black where it is bright;
    D_P alone stops at a constant image, because every pixel first has to pass through x."""
    floor_db: float = 3.0
    """A poisoned PSNR below it earns nothing more (without a floor the loss is unbounded)."""
    per_sample: bool = False
    """Take the maximum image by image instead of between the batch means."""
    guarded: bool = True
    """Another gradient of the maximum, see `excess_over`."""
    opening: Weight = 0.2
    """An attack that has lost less than 4 dB when the budget has come 15 % of its way begins anew, with four times
    beta: what R(T(x)) exceeds R(x) by is free then and every bit of it earns this much, until the attack has taken 14
    dB; up to 24 dB both fade out. 0: never, and neither where a run starts from another or is robust."""


class FixedQualityArguments(Arguments):
    """Hyper-parameters of Eq. (5)."""

    alpha: Weight = 1.0
    """Weight of the poisoned image's rate."""
    beta: Weight = 5.0
    """Weight of the attack."""
    farthest: bool = True
    """As in `QualityArguments`."""
    floor_db: float = 3.0
    """As in `QualityArguments`."""


class WeightsOfDownstream(Arguments):
    """Weights of Eq. (8)."""

    alpha: Weight = 0.1
    """Weight of the poisoned images' rate-distortion loss."""
    beta: Weight = 0.2
    """Weight of the attack."""


class DownstreamArguments(WeightsOfDownstream):
    """Hyper-parameters of Eq. (8) with a victim of the user's."""

    victim: Any
    """A `Victim`, or "package.module:factory" of a function that makes one."""


class VictimArguments(Arguments):
    """What all victims have in common."""

    varied: bool = False
    """Show the network every decoded batch through one preprocessing, drawn at random, so that what is learnt misleads
    other networks too."""


class TargetedSegmentationArguments(VictimArguments):
    """Arguments of `TargetedSegmentation`."""

    source: str
    """A class of the network, or a group of its spec."""
    target: str
    """The same; of a group, its first class."""
    also: str = ""
    """While training, each batch is one of the source class together with these classes or groups, each of which takes
    part every second time: a class that covers a twentieth of the picture teaches little."""
    masks: Literal["network", "labels"] = "network"
    """Where the source class is, by the network's prediction (the paper) or by the data set's labels."""
    balanced: bool = True
    """Mean over the source pixels + mean over the others, instead of over all: a class that covers a twentieth of the
    picture else counts a twentieth."""
    shift: float = 0.0
    """Boundary shift: the target's logit is lowered by so much at source pixels, so that the attack has to go beyond
    the boundary of this network, and with it of others."""
    weight: Weight = 1.0
    """Weight of the cross-entropy; with 0, and masks from labels, no network is asked in training at all."""
    paint: Weight = 0.0
    """Weight of the mean squared distance of decoded source pixels, in [0, 1], from `colour`: what looks like the
    target misleads networks that were not trained against."""
    margin: Annotated[int, Field(ge=0, strict=False)] = 0
    """Pixels around the source that are painted too: an outline that is left still looks like the source."""
    colour: Annotated[str, Field(pattern="^(#[0-9a-fA-F]{6})?$")] = ""
    """As "#rrggbb"; by default the mean colour of the picture's target pixels."""


class IdentityRemovalArguments(VictimArguments):
    """Arguments of `IdentityRemoval`."""

    floor: float = -1.0
    """No reward for a cosine below it: 0 is what two different persons have."""


class SegmentationArguments(TargetedSegmentationArguments, WeightsOfDownstream):
    """Hyper-parameters of Eq. (11)."""

    network: str | None = None
    """g, a name that `load_network` understands; none: the run's own. Of several with the same classes, apart by
    semicolons, one is drawn for every batch."""


class FaceArguments(IdentityRemovalArguments, WeightsOfDownstream):
    """Hyper-parameters of Eq. (13)."""

    network: str | None = None
    """g, a name that `load_network` understands; none: the run's own."""
    beta: Weight = 0.05
    """Weight of the attack."""
