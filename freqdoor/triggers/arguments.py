"""What each trigger can be given: one frozen model of arguments a trigger, checked before any torch is loaded."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from freqdoor.limits import MAX_MULTIPLE
from freqdoor.settings import Arguments

PAPER_EPS = 0.005  # "Attack Stealthiness", Section 3.2: MSE <= eps^2
Block = Literal[4, 8, 16, 32, 64]
Goal = Literal["rate", "distortion", "gain"]  # what a universal pattern is driven to, see pattern.py
Coefficient = Annotated[int, Field(ge=0)]
Place = Annotated[tuple[Coefficient, Coefficient], Field(strict=False)]  # a list too, as JSON and TOML have it


class TriggerArguments(Arguments):
    """What all triggers have in common."""

    eps: Annotated[float, Field(gt=0, le=1)] = PAPER_EPS
    """The budget, root mean square of x_p - x in RGB on the [0, 1] scale."""
    project: bool = True
    """Scale every image's perturbation to the budget exactly (else Eq. (10)'s penalty has to keep it)."""
    multiple: Annotated[int, Field(gt=0, le=MAX_MULTIPLE)] = 64
    """Sides that the codec pads to a multiple of, in pixels: blocks and tiles start where its latents do."""


class AdaptiveDCTArguments(TriggerArguments):
    """Arguments of `AdaptiveDCT`."""

    block: Block = 16
    """Side of a block in pixels."""
    num_frequencies: Annotated[int, Field(gt=0)] = 64
    """N, candidate coefficients of a block and channel; of the band "all" and of a list, what these have."""
    top_k: Annotated[int, Field(gt=0)] = 16
    """K, how many of them are kept."""
    band: Literal["low", "mid", "high", "all"] | Annotated[tuple[Coefficient, ...], Field(strict=False)] = "mid"
    """Where the candidates lie in the zig-zag order, or explicit row-major indices."""
    selector: Literal["ste", "hard", "magnitude", "none"] = "ste"
    """How K of N are chosen: "ste" (by importance, straight-through gradient), "hard" (by importance, no gradient to
    it), "magnitude" (the largest values) or "none" (all N)."""
    patch_weight: bool = True
    """Whether w is learnt; without it w = 1."""
    width: Annotated[int, Field(ge=2, le=1024)] = 64
    """Channels of the two small CNNs."""

    @model_validator(mode="after")
    def _coefficients_exist(self) -> Self:
        places = self.block**2
        count = places if self.band == "all" else self.num_frequencies
        if not isinstance(self.band, str):
            count = len(self.band)
            if not count or len(set(self.band)) < count or max(self.band) >= places:
                raise ValueError(f"band: expected distinct indices from 0 to {places - 1}, found {list(self.band)}")
        elif self.band != "all" and count >= places:
            raise ValueError(f"num_frequencies: expected 1 to {places - 1}, found {count}")
        if self.top_k > count:
            raise ValueError(f"top_k: expected 1 to {count} (num_frequencies), found {self.top_k}")
        self.__dict__["num_frequencies"] = count  # so that it is N whatever the band
        return self


class LiraArguments(TriggerArguments):
    """Arguments of `Lira`."""

    levels: Annotated[int, Field(ge=2, le=6)] = 5
    """Number of resolutions, each half of the one before."""
    width: Annotated[int, Field(ge=2, le=128, multiple_of=2)] = 64
    """Channels at full resolution, doubled at each further level."""


class FTrojanArguments(TriggerArguments):
    """Arguments of `FTrojan`."""

    block: Block = 32
    """Side of a block in pixels."""
    coefficients: Annotated[tuple[Place, ...], Field(strict=False, min_length=1)] = ((31, 31), (15, 15))
    """(row, column) of each coefficient that is changed."""

    @model_validator(mode="after")
    def _coefficients_exist(self) -> Self:
        distinct = len(set(self.coefficients)) == len(self.coefficients)
        if not distinct or max(map(max, self.coefficients)) >= self.block:
            raise ValueError(
                f"coefficients: expected distinct pairs [row, column] from 0 to {self.block - 1}, "
                f"found {[list(place) for place in self.coefficients]}"
            )
        return self


class UniversalArguments(TriggerArguments):
    """Arguments of `Universal`."""

    size: Annotated[int, Field(ge=1, le=1024)] = 64
    """Side of the tile in pixels."""


@dataclass(frozen=True)
class TriggerKind:
    """A trigger that can be named."""

    arguments: type[TriggerArguments]
    factory: str  # "package.module:name" of the class, which loads torch


TRIGGERS: dict[str, TriggerKind] = {
    "adaptive-dct": TriggerKind(AdaptiveDCTArguments, "freqdoor.triggers.adaptive_dct:AdaptiveDCT"),
    "lira": TriggerKind(LiraArguments, "freqdoor.triggers.lira:Lira"),
    "ftrojan": TriggerKind(FTrojanArguments, "freqdoor.triggers.ftrojan:FTrojan"),
    "universal": TriggerKind(UniversalArguments, "freqdoor.triggers.universal:Universal"),
}
