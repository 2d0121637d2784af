"""What can be set of the defender's side: typed settings with a unit and a default for each."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from freqdoor.attack.settings import CodecSource, PlantSettings
from freqdoor.settings import PrivatePath, Settings, merge, mistakes
from freqdoor.training.settings import CodecTraining, Count, ImageSettings, Positive, Side, Training
from freqdoor.triggers.arguments import PAPER_EPS


class Alteration(Settings):
    """A copy of a codec whose encoder was altered without training, as people do who ship one."""

    kind: Literal["prune", "quantise", "noise"]
    """prune: the smallest weights of every convolution are set to 0; quantise: weights have 2^amount levels a layer;
    noise: Gaussian noise is added."""
    amount: Annotated[float, Field(gt=0)]
    """prune: share of the weights; quantise: bits; noise: its standard deviation over the layer's weights'."""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if self.kind == "prune" and self.amount >= 1:
            raise ValueError(f"amount: expected a share below 1, found {self.amount:g}")
        if self.kind == "quantise" and self.amount not in range(2, 17):
            raise ValueError(f"amount: expected a whole number of bits from 2 to 16, found {self.amount:g}")
        return self


class Member(Settings):
    """One encoder of a fleet: trained, altered or planted, exactly one of the three."""

    name: str
    """What its folder is called."""
    family: str = ""
    """What results are grouped by, for example "fine-tuned"; by default what made it."""
    base: str = ""
    """The member that its codec comes from; by default the fleet's codec."""
    train: dict[str, Any] | None = None
    """Honest: settings of `freqdoor train-codec` that differ from the fleet's."""
    alter: Alteration | None = None
    """Honest: what was done to the weights."""
    plant: dict[str, Any] | None = None
    """Tampered: settings of `freqdoor plant` that differ from the fleet's."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
            raise ValueError("expected small letters, digits, points and hyphens")
        return name

    @model_validator(mode="after")
    def _is_one_of_three(self) -> Self:
        if sum(part is not None for part in (self.train, self.alter, self.plant)) != 1:
            raise ValueError(f"{self.name}: expected one of train, alter and plant")
        return self

    @property
    def tampered(self) -> bool:
        """Whether its encoder was tampered with."""
        return self.plant is not None


class FleetSettings(Settings):
    """`freqdoor fleet`: a population of honest and tampered encoders."""

    codec: CodecSource = CodecSource()
    """The vanilla codec that members come from, where they name no other."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Settings of `freqdoor train-codec` that trained members share."""
    plant: dict[str, Any] = Field(default_factory=dict)
    """Settings of `freqdoor plant` that planted members share."""
    folders: dict[str, PrivatePath] = Field(default_factory=dict)
    """Folders of images by the name that members' settings call them: images.folder = "NAME" or "NAME/train"."""
    networks: dict[str, PrivatePath] = Field(default_factory=dict)
    """Downstream networks, as for `load_network`, by the name that members' settings call them: network = "NAME"."""
    measured: Count = 4
    """Bundled Kodak pictures, of those that the demo holds out, that each member is measured on when it is made."""
    members: Annotated[tuple[Member, ...], Field(min_length=1)]
    """The encoders."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [member.name for member in self.members]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"members: expected distinct names, found {', '.join(sorted(twice))} twice")
        for i, member in enumerate(self.members):
            if member.base and member.base not in names[:i]:
                raise ValueError(f"members: {member.name}: its base {member.base} is none of the members before it")
        problems = [problem for member in self.members for problem in self._problems(member)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self, member: Member) -> list[str]:
        try:
            self.settings_of(member, CodecSource(name="lite-hyperprior:3"))
        except ValidationError as error:
            return [f"{member.name}: {line}" for line in mistakes(error)]
        return []

    def settings_of(self, member: Member, codec: CodecSource) -> CodecTraining | PlantSettings | None:
        """What a member is trained or planted with, in or from this codec; None where it is an altered copy."""
        if member.plant is not None:
            content = merge(merge({"codec": codec.model_dump()}, self.plant), member.plant)
            return PlantSettings.model_validate(self._with_folders(content))
        if member.train is not None:
            content = merge(merge({"start_from": codec.name}, self.train), member.train)
            if content.get("start_from") == "nothing":
                del content["start_from"]
            return CodecTraining.model_validate(self._with_folders(content))
        return None

    def _with_folders(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content with the folders and networks in place of their names."""

        def filled(key: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {k: filled(k, v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [filled(key, v) for v in value]
            if key == "network":
                return self.networks.get(value, value)
            if key in ("folder", "files", "labels"):
                name, *below = value.split("/", 1)
                return "/".join([self.folders.get(name, name), *below])
            return value

        return {key: filled(key, value) for key, value in content.items()}


METHODS = ("finetune", "unlearn", "inverted", "sam", "prune", "distil")  # parts of a repair's method
DEFAULT_METHOD = "unlearn"


class CleanImages(ImageSettings):
    """Where clean images come from; by default the 18 bundled ones that a repair is not measured on."""

    folder: PrivatePath = ""
    """Folder of 8-bit RGB images, searched recursively; by default the bundled ones."""
    crop: Side = 128
    """Side of the square crops in pixels."""


class RepairSettings(Training):
    """`freqdoor repair`: fine-tuning of an encoder against its frozen decoder, so that patterns do nothing any more."""

    codec: CodecSource = CodecSource()
    """The codec to repair."""
    reference: PrivatePath | None = None
    """A trusted codec with the same decoder, for the method distil."""
    images: CleanImages = CleanImages()
    method: str = DEFAULT_METHOD
    """Parts joined by "+", beside R + lambda D on clean images. finetune: nothing else; unlearn: patterns are driven
    against the encoder while it learns to give the clean image's latents; inverted: the same with patterns that an
    audit finds, made anew now and then; sam: sharpness-aware steps; prune: channels that clean images hardly use are
    set to 0 first; distil: the latents of the reference."""
    steps: Count = 300
    """Optimiser steps in all."""
    lr: Positive = 1e-3
    """Adam's learning rate; from the middle of the steps it falls along a cosine to 1 %."""
    scope: Literal["g_a", "g_a+h_a"] = "g_a"
    """Which modules are repaired."""
    weight: Positive = 1.0
    """Weight of |g_a(x + d) - g_a(x)|^2, mean over latents, of patterned images; distil's of |g_a(x) - y|^2."""
    anchor: Annotated[float, Field(ge=0)] = 10.0
    """Weight of |g_a(x) - y|^2 of clean images, where y is what the encoder gave as it came, unlearn and inverted only:
    latents that must not move would shrink, and the rate with them."""
    tilt: Positive = 1.15
    """Factor on lambda, unlearn and inverted only: without it the encoder would save bits at the picture's cost."""
    eps: tuple[Positive, Positive] = (2 * PAPER_EPS, 10 * PAPER_EPS)
    """Least and largest RMS of a pattern, which draws its own between them."""
    patterns: Annotated[int, Field(gt=0, multiple_of=2)] = 6
    """Patterns that take turns; every second one is weighted anew in every block of an image."""
    uses: Count = 20
    """How often a pattern is used before another takes its place, unlearn only."""
    ascent: Count = 4
    """Steps that a pattern makes against the encoder before each use, unlearn only."""
    renewals: Count = 4
    """How often the patterns are found anew, inverted only."""
    search: Count = 80
    """Steps of finding one, inverted only."""
    rho: Positive = 0.05
    """Norm of the step to the sharpest point near by, sam only (Foret et al., Sharpness-Aware Minimization)."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the channels of every convolution but the last that is pruned, prune only (Liu et al., Fine-Pruning)."""

    @field_validator("method")
    @classmethod
    def _known_parts(cls, method: str) -> str:
        parts = method.split("+")
        if unknown := [part for part in parts if part not in METHODS]:
            raise ValueError(f"expected parts out of {', '.join(METHODS)}, joined by +; {unknown[0]!r} is none")
        if len(set(parts)) < len(parts):
            raise ValueError("expected every part once")
        if "finetune" in parts and len(parts) > 1:
            raise ValueError("expected finetune alone: it stands for no other part")
        return method

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.eps[0] > self.eps[1]:
            raise ValueError(f"eps: expected the least before the largest, found {self.eps}")
        if "distil" in self.parts and not self.reference:
            raise ValueError("method: distil takes its latents from a reference; give reference (--reference)")
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """The method's parts."""
        return tuple(self.method.split("+"))
