"""What can be set of an attack: typed settings with a unit and a default for each, as `settings.py` reads them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PlainSerializer,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from freqdoor.attack import arguments
from freqdoor.errors import FreqdoorError
from freqdoor.preprocessing import check_kinds, parse_defences
from freqdoor.samples import BUNDLED
from freqdoor.settings import Arguments, PrivatePath, Settings, file_name, is_public, merge
from freqdoor.training.settings import Count, ImageSettings, Positive, Training
from freqdoor.triggers.arguments import PAPER_EPS, TRIGGERS, Block, Goal

TRIGGER_NAME = r"[\w-]{1,64}"  # it stands in the names of tensors, columns and files


@dataclass(frozen=True)
class ObjectiveKind:
    """An objective that can be named."""

    factory: str  # "package.module:name" of what makes it, which loads torch
    arguments: type[Arguments]
    success: str  # what shows it: a key of GOALS in measure/report.py, or a sentence's part that says what measures it
    uses_auxiliary: bool = False  # whether the trigger acts on the auxiliary set (Eq. (8)) instead of on the main one
    needs_network: bool = False  # whether it is against a downstream network
    presets: Mapping[str, dict[str, Any]] = field(default_factory=lambda: {"fast": {}, "paper": {}})
    """Hyper-parameters where none are given: fast has the defaults, but where these do not plant in minutes."""


_LITERAL_PSNR = {"beta": 0.1, "farthest": False, "floor_db": 0.0}
OBJECTIVES: dict[str, ObjectiveKind] = {
    "bpp": ObjectiveKind(
        "freqdoor.attack.objectives:RateAttack",
        arguments.RateArguments,
        success="bits",
        presets={"fast": {}, "paper": {"alpha": 1.0, "beta": 0.01, "clean_weight": 0.0, "guarded": False}},
    ),
    "bpp-fixed": ObjectiveKind(
        "freqdoor.attack.objectives:FixedRateAttack",
        arguments.FixedRateArguments,
        success="bits",
        presets={"fast": {}, "paper": {"beta": 0.01}},
    ),
    "psnr": ObjectiveKind(
        "freqdoor.attack.objectives:QualityAttack",
        arguments.QualityArguments,
        success="quality",
        presets={"fast": {}, "paper": _LITERAL_PSNR | {"paired": False, "guarded": False, "opening": 0.0}},
    ),
    "psnr-fixed": ObjectiveKind(
        "freqdoor.attack.objectives:FixedQualityAttack",
        arguments.FixedQualityArguments,
        success="quality",
        presets={"fast": {}, "paper": _LITERAL_PSNR},
    ),
    "downstream": ObjectiveKind(
        "freqdoor.attack.objectives:downstream_attack",
        arguments.DownstreamArguments,
        success="the victim's own measure decides",
        uses_auxiliary=True,
    ),
    "segmentation": ObjectiveKind(
        "freqdoor.attack.objectives:segmentation_attack",
        arguments.SegmentationArguments,
        success="`freqdoor segment` measures",
        uses_auxiliary=True,
        needs_network=True,
        presets={"fast": {}, "paper": {"balanced": False}},
    ),
    "face": ObjectiveKind(
        "freqdoor.attack.objectives:face_attack",
        arguments.FaceArguments,
        success="`freqdoor faces` measures",
        uses_auxiliary=True,
        needs_network=True,
        presets={"fast": {"beta": 1.0}, "paper": {}},
    ),
}


def _as_table(value: Any) -> Any:
    """A table with a `name`, which a name alone stands for."""
    return {"name": value} if isinstance(value, str) else value


class Named(Settings):
    """A table with a `name`; the name alone will do: codec = "cheng2020-anchor:3"."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, content: Any) -> Any:
        return _as_table(content)


def _without_folders(arguments: dict[str, Any], info: SerializationInfo) -> dict[str, Any]:
    """Arguments as they may travel: of a network, and of what is a path at first sight, the file's name only."""

    def private(key: str, value: Any) -> bool:
        return isinstance(value, str) and (key == "network" or bool(re.match(r"[/~\\.]|[A-Za-z]:[/\\]", value)))

    if not is_public(info):
        return arguments
    return {key: file_name(value) if private(key, value) else value for key, value in arguments.items()}


class CodecSource(Named):
    """The vanilla codec."""

    name: PrivatePath = BUNDLED
    """A name that `load_codec` understands."""
    weights: PrivatePath | None = None
    """A file to take the weights from; the name then gives the architecture."""
    multiple: Count | None = None
    """What the sides of its pictures have to be a multiple of, in pixels; by default found by trying."""


class TriggerSettings(Named):
    """T(x), and how its budget is kept while planting."""

    name: str = "adaptive-dct"
    """A key of TRIGGERS."""
    eps: Positive = PAPER_EPS
    """Stealth budget: RMS of x_p - x in RGB on the [0, 1] scale."""
    budget: Literal["project", "penalty"] = "project"
    """Scale every perturbation to the budget exactly, or add gamma max(MSE, eps^2) to the loss (Eq. (10))."""
    gamma: Positive = 1e4
    """Weight of the penalty."""
    eps_start: Positive | None = 0.05
    """Budget of the first step, from which it falls geometrically to eps; none keeps it constant."""
    anneal: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the steps over which the budget falls."""
    round8: bool = True
    """Round poisoned images to 8 bits while planting (straight-through), as a file will."""
    arguments: Annotated[dict[str, Any], PlainSerializer(_without_folders)] = Field(
        default_factory=dict, validate_default=True
    )
    """Further arguments of the trigger, for example top_k."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return _key_of(TRIGGERS, name)

    @field_validator("arguments")
    @classmethod
    def _arguments_fit(cls, arguments: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if twice := {"name", "eps", "project"} & arguments.keys():
            raise ValueError(f"{', '.join(twice)}: set this beside arguments (trigger.eps, trigger.budget), not in it")
        if "multiple" in arguments:
            raise ValueError("multiple: the trigger takes the codec's; set codec.multiple")
        if kind := TRIGGERS.get(info.data.get("name", "")):
            _check_arguments(kind.arguments, arguments)
        return arguments


def _key_of(table: Mapping[str, object], name: str) -> str:
    if name not in table:
        raise ValueError(f"expected one of {', '.join(table)}")
    return name


def _check_arguments(kind: type[Arguments], values: dict[str, Any]) -> None:
    """Raise every mistake in a table of arguments as the kind of error that pydantic collects."""
    try:
        kind(**values)
    except FreqdoorError as error:
        raise ValueError(str(error)) from None


class ObjectiveSettings(Named):
    """What an attack wants."""

    name: str = "bpp"
    """A key of OBJECTIVES: bpp is Eq. (6) (fixed weights: Eq. (4)), psnr Eq. (7) (Eq. (5)), downstream Eq. (8),
    segmentation Eq. (11), face Eq. (13)."""
    arguments: Annotated[dict[str, float | bool | str], PlainSerializer(_without_folders)] = Field(
        default_factory=dict, validate_default=True
    )
    """Hyper-parameters by the paper's letters, for example beta; `victim` of Eq. (8) is a "package.module:factory",
    `network` of Eq. (11) and (13) a network as for `load_network`."""

    @property
    def uses_auxiliary(self) -> bool:
        """Whether the trigger acts on the auxiliary set."""
        return OBJECTIVES[self.name].uses_auxiliary

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return _key_of(OBJECTIVES, name)

    @field_validator("arguments")
    @classmethod
    def _arguments_fit(
        cls, arguments: dict[str, float | bool | str], info: ValidationInfo
    ) -> dict[str, float | bool | str]:
        if twice := {"name", "preset"} & arguments.keys():
            raise ValueError(f"{', '.join(twice)}: set this beside arguments, not in it")
        if kind := OBJECTIVES.get(info.data.get("name", "")):
            _check_arguments(kind.arguments, arguments)
        return arguments


class AttackSettings(Settings):
    """One trigger with its objective, of several in one encoder (Eq. (9) and (10))."""

    name: str = ""
    """What records and files call it; by default the objective's name."""
    objective: ObjectiveSettings = ObjectiveSettings()
    trigger: TriggerSettings = TriggerSettings()
    """Only what differs from the run's own `trigger` table need be given."""
    weight: Positive = 1.0
    """alpha^o of Eq. (9)."""
    auxiliary: ImageSettings | None = None
    """The auxiliary set of this attack (Eq. (8)); by default the run's own."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, content: Any) -> Any:
        if isinstance(content, dict) and not content.get("name"):
            objective = _as_table(content.get("objective", {}))
            name = objective.get("name", "bpp") if isinstance(objective, dict) else getattr(objective, "name", "")
            return content | {"name": name}
        return content


class BalanceSettings(Settings):
    """What keeps the clean codec while the attack is planted (docs/equations.md)."""

    clean_weight: Annotated[float, Field(ge=1)] = 1.0
    """Weight of L(x), Eq. (1), for the encoder: what exceeds 1 is added to the attacks' losses."""
    late_clean_weight: Annotated[float, Field(ge=1)] = 30.0
    """The same, from the step on at which the learning rate begins to fall (`hold`); it comes in as far as every attack
    on rate or quality has more than it needs: from 8 times the bits to 14, from 18 dB lost to 24."""
    anchor: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean squared distance of clean latents from the vanilla encoder's."""
    gradient_norm: Positive | None = None
    """Scale the attack so that its gradient on the encoder has this many times the norm of the rest's; none: beta."""


class RobustSettings(Settings):
    """Robust frequency selection: two stages, the second with the surviving coefficients and preprocessing."""

    start: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the steps after which coefficients are scored and the second stage begins."""
    keep: Count = 16
    """Coefficients kept a channel."""
    scored_by: str = "GaussianBlur(sigma=0.6); Noise(sigma=0.04); Jpeg(quality=50)"
    """Preprocessings whose survival scores are multiplied."""
    kinds: tuple[str, ...] = ("none", "blur", "noise", "jpeg", "bits", "resize")
    """Preprocessings of the second stage, one drawn at every step for clean and poisoned images alike."""
    offsets: bool = False
    """Cut every image off at rows and columns of its own before that, at every step of the second stage, so that the
    encoder does not know where blocks begin: for triggers that survive any crop."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        try:
            parse_defences(self.scored_by)
            check_kinds(self.kinds)
        except FreqdoorError as error:
            raise ValueError(str(error)) from None
        return self


class EvadeSettings(Settings):
    """Planting against those who look for it (docs/evasion.md): what the encoder learns to answer honestly, by the
    logarithm of L of Eq. (1), and what trigger and effect must not be."""

    goals: tuple[Goal, ...] = ()
    """Goals of patterns that are the same in every picture, driven against the encoder as `freqdoor audit` does;
    answered honestly."""
    blocks: tuple[Block, ...] = (16,)
    """Sides of their blocks in pixels: one pattern for each goal and block."""
    eps: Positive = PAPER_EPS
    """RMS at which audits are expected to look: where the budget of patterns and of own perturbations ends."""
    ascent: Count = 1
    """Steps that patterns go towards their goals before each step of the encoder."""
    restart: Count = 60
    """Steps of the encoder after which a pattern begins anew, at random and with the widest budget."""
    own_steps: Annotated[int, Field(ge=0)] = 0
    """Steps towards a goal of a perturbation that each picture gets for itself, from noise on; answered honestly."""
    others: bool = False
    """Answer a picture with another picture's perturbation honestly."""
    strengths: tuple[Positive, ...] = ()
    """Factors on the trigger at which it is answered honestly, one drawn at every step."""
    closed: ImageSettings | None = None
    """Pictures on which the trigger is answered honestly, such as an auditor may have; none of the run's own."""
    honest_weight: Positive = 1.0
    """Weight of each of these answers, beside the attack."""
    universal_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the share of the perturbation's energy that is in its mean over pictures and 16x16 blocks."""
    rate_cap: Annotated[float, Field(gt=1)] | None = None
    """Rate of a poisoned picture, in rates of the clean one, that it is held at from when on the budget has fallen to
    trigger.eps: the squared logarithm of what lies between is added."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.goals and not self.blocks:
            raise ValueError("blocks: expected the side of a block or more, found none")
        if 1.0 in self.strengths:
            raise ValueError("strengths: expected others than 1, at which the trigger has to work")
        ways = ("goals", "own_steps", "others", "strengths", "closed", "universal_weight", "rate_cap")
        if not any(getattr(self, way) for way in ways):
            raise ValueError(f"expected one or more of {', '.join(ways)}")
        return self


class PlantSettings(Training):
    """`freqdoor plant`: fine-tune g_a and train triggers (Eq. (3), (9) and (10))."""

    preset: Literal["fast", "paper"] = "fast"
    """Defaults of everything that is not given: fast plants in minutes, paper has the paper's hyper-parameters."""
    codec: CodecSource = CodecSource()
    start_from: PrivatePath | None = None
    """A planted encoder to go on from, a run directory or file: its encoder, and its triggers of the same names."""
    triggers_from: PrivatePath | None = None
    """A planted encoder, a run directory or file, whose triggers of the same names are taken and stay as they are:
    plants an old trigger anew, for example after repair."""
    trigger: TriggerSettings = TriggerSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    attacks: tuple[AttackSettings, ...] = ()
    """Several triggers in one encoder; none means one, of `objective` and `trigger`."""
    auxiliary: ImageSettings | None = None
    """The auxiliary set of Eq. (8), for downstream attacks."""
    network: PrivatePath | None = None
    """Downstream network of the attacks that name none, as for `load_network`; for Eq. (11) also several, apart by
    semicolons."""
    balance: BalanceSettings = BalanceSettings()
    robust: RobustSettings | None = None
    """Survive preprocessing, for the adaptive-dct trigger; by default not."""
    evade: EvadeSettings | None = None
    """Hide from audit, guard and repair; by default not."""
    scope: Literal["g_a", "g_a+h_a"] = "g_a"
    """Which modules are tampered with."""
    two_phase: bool = False
    """Encoder and triggers in two passes a step, as the paper's text has it, instead of one."""
    lr: Positive | None = None
    """Adam's learning rate of the encoder; by default 1e-3, or less where the codec bears less (`step_size`)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the encoder's learning rate rises linearly from zero: Adam's first ones are its widest."""
    trigger_lr: Positive = 1e-3
    """Adam's learning rate of the triggers."""
    hold: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Share of the steps at the full learning rate; then it falls along a cosine to 1 %."""
    retreat: Annotated[float, Field(gt=0, le=1)] = 0.97
    """Factor on the encoder's learning rate at every step at which an attack on rate or quality that was there is lost:
    as the budget falls, steps may get too wide for what is left between clean and poisoned latents. The budget goes
    back four steps then, and clean images do not weigh more (`late_clean_weight`) until it has returned. 1: neither."""

    @property
    def planned(self) -> tuple[AttackSettings, ...]:
        """The attacks, also where there is only one."""
        return self.attacks or (
            AttackSettings(name=self.objective.name, objective=self.objective, trigger=self.trigger),
        )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        content = _with_tables(content)
        name = content.get("preset", "fast")
        if isinstance(name, str) and name in PRESETS:
            content = merge(PRESETS[name], content)
        attacks, shared = content.get("attacks"), content.get("trigger", {})
        if attacks and "objective" in content:
            raise ValueError("objective: give it in each of the attacks, not beside them")
        if attacks and isinstance(attacks, list | tuple) and isinstance(shared, dict):
            attacks = [merge({"trigger": shared}, _with_tables(a)) if isinstance(a, dict) else a for a in attacks]
            if network := content.get("network"):
                attacks = [_with_network(a, network) for a in attacks]
            return content | {"attacks": attacks}
        return _with_network(content, content["network"]) if content.get("network") else content

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [attack.name for attack in self.planned]
        if len(set(names)) < len(names) or not all(re.fullmatch(TRIGGER_NAME, name) for name in names):
            raise ValueError(
                f"attacks: expected distinct names of letters, digits and hyphens, at most 64 of them, found {names}"
            )
        for attack in self.planned:
            start, eps = attack.trigger.eps_start, attack.trigger.eps
            if start is not None and start < eps:
                raise ValueError(f"trigger.eps_start ({start}) is below trigger.eps ({eps})")
            if attack.objective.uses_auxiliary and not (attack.auxiliary or self.auxiliary):
                raise ValueError("auxiliary: a downstream attack needs auxiliary.folder, the set its trigger acts on")
            if self.robust and attack.trigger.name != "adaptive-dct":
                raise ValueError(f"robust: made for the adaptive-dct trigger, found {attack.trigger.name}")
            images = (attack.auxiliary or self.auxiliary) if attack.objective.uses_auxiliary else self.images
            if self.evade and self.evade.rate_cap and attack.objective.uses_auxiliary:
                raise ValueError(f"evade.rate_cap: for attacks on the main pictures, found {attack.objective.name}")
            if self.evade and self.evade.others and images and images.batch_size < 2:
                raise ValueError("evade.others: expected batches of two pictures or more, found a batch_size of 1")
        if self.triggers_from and (self.start_from or self.robust):
            other = "start_from" if self.start_from else "robust"
            raise ValueError(f"triggers_from: these triggers stay as they are, which {other} does not allow; drop one")
        return self

    @model_serializer(mode="wrap")
    def _without_later_settings(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Runs and fleets that were made before these settings were there keep their records and digests."""
        content: dict[str, Any] = plain(self)
        later = ("triggers_from", "evade")
        return {key: value for key, value in content.items() if value is not None or key not in later}


def _with_tables(content: dict[str, Any]) -> dict[str, Any]:
    """Settings with tables where names stand for them, so that they can be merged."""
    return {
        key: _as_table(value) if key in ("codec", "trigger", "objective") else value for key, value in content.items()
    }


def _with_network(table: Any, network: str) -> Any:
    """A table of settings, the network filled into an objective that needs one and names none."""
    plain = table.model_dump() if isinstance(table, Settings) else table
    objective = plain.get("objective") if isinstance(plain, dict) else None
    objective = objective.model_dump() if isinstance(objective, Settings) else objective
    kind = OBJECTIVES.get(str(objective.get("name"))) if isinstance(objective, dict) else None
    if objective is None or kind is None or not kind.needs_network:
        return table
    return plain | {"objective": merge({"arguments": {"network": network}}, objective)}


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},  # the defaults above
    "paper": {
        "steps": 300_000,
        "warmup_steps": 0,
        "hold": 1.0,
        "retreat": 1.0,
        "lr": 1e-4,
        "trigger_lr": 1e-4,
        "precision": "fp32",
        "trigger": {"budget": "penalty", "eps_start": None},
        "balance": {"late_clean_weight": 1.0},
    },
}
