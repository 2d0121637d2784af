"""Typed settings, read from TOML with dotted overrides; every mistake in a file is reported at once."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from freqdoor.types import BUNDLED, FreqdoorError

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Settings(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ImageSettings(Settings):
    """Where training crops come from."""

    folder: str
    """Folder of 8-bit RGB images, searched recursively."""
    crop: Annotated[int, Field(gt=0, multiple_of=64)] = 256
    """Side of the square crops in pixels; a multiple of the codecs' stride of 64."""
    batch_size: Count = 8
    """Crops per step."""
    skip_broken: bool = False
    """Go on without images that cannot be used, and name them, instead of stopping."""


class CodecTraining(Settings):
    """`freqdoor train-codec`: rate-distortion training, R + lambda 255^2 MSE (Eq. 1 and 2)."""

    codec: str
    """Architecture and quality, for example "bmshj2018-hyperprior:3"."""
    images: ImageSettings
    lmbda: Positive | None = None
    """Lambda; by default the one of the codec's quality."""
    steps: Count = 100_000
    """Optimiser steps in all."""
    lr: Positive = 1e-4
    """Adam's learning rate."""
    aux_lr: Positive = 1e-3
    """Learning rate of the entropy bottleneck's quantiles."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    """plateau: divided by 10 after `patience` validations without a better loss; cosine: to 1 % at the last step."""
    patience: Count = 10
    """Validations without improvement before the plateau schedule acts."""
    validate_every: Count = 1000
    """Steps between validations on `validation` images."""
    validation: str | None = None
    """Folder of images for validation; by default the training loss is averaged instead."""
    clip: Positive = 1.0
    """Largest norm of the gradient."""
    klt: bool = True
    """Start lite-hyperprior from a Karhunen-Loeve transform of the training images; other codecs start at random."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of g_a and g_s; entropy models are always in fp32."""
    channels_last: bool = True
    """Memory layout that is faster on most CPUs and GPUs."""
    checkpoint_minutes: Positive = 3.0
    """Minutes between checkpoints."""
    device: str = "cpu"
    """PyTorch device."""
    seed: int = 0
    """Seed of weights, crops and quantisation noise."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self


class CodecSource(Settings):
    """The vanilla codec."""

    name: str = BUNDLED
    """A name that `load_codec` understands."""
    weights: str | None = None
    """A file to take the weights from; the name then gives the architecture."""


class TriggerSettings(Settings):
    """T(x), and how its budget is kept while planting."""

    name: str = "adaptive-dct"
    """A key of TRIGGERS."""
    eps: Positive = 0.005
    """Stealth budget: RMS of x_p - x in RGB on the [0, 1] scale."""
    budget: Literal["project", "penalty"] = "project"
    """Scale every perturbation to the budget exactly, or add gamma max(MSE, eps^2) to the loss (Eq. 10)."""
    gamma: Positive = 1e4
    """Weight of the penalty."""
    eps_start: Positive | None = 0.05
    """Budget of the first step, from which it falls geometrically to eps; none keeps it constant."""
    anneal: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the steps over which the budget falls."""
    round8: bool = True
    """Round poisoned images to 8 bits while planting (straight-through), as a file will."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the trigger, for example top_k."""

    @field_validator("arguments")
    @classmethod
    def _not_twice(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if twice := {"name", "eps", "project"} & arguments.keys():
            raise ValueError(f"{', '.join(twice)}: set this beside arguments (trigger.eps, trigger.budget), not in it")
        return arguments


class ObjectiveSettings(Settings):
    """What the attack wants."""

    name: Literal["bpp", "psnr"] = "bpp"
    """A key of OBJECTIVES: bpp is Eq. 6, psnr is Eq. 7."""
    arguments: dict[str, float | bool] = Field(default_factory=dict)
    """Hyper-parameters by the paper's letters, for example beta."""

    @field_validator("arguments")
    @classmethod
    def _not_twice(cls, arguments: dict[str, float | bool]) -> dict[str, float | bool]:
        if twice := {"name", "preset"} & arguments.keys():
            raise ValueError(f"{', '.join(twice)}: set this beside arguments, not in it")
        return arguments


class PlantSettings(Settings):
    """`freqdoor plant`: fine-tune g_a and train a trigger (Eq. 3, 9 and 10)."""

    images: ImageSettings
    preset: Literal["fast", "paper"] = "fast"
    """Defaults of everything that is not given: fast plants in minutes, paper has the paper's hyper-parameters."""
    codec: CodecSource = CodecSource()
    trigger: TriggerSettings = TriggerSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    scope: Literal["g_a", "g_a+h_a"] = "g_a"
    """Which modules are tampered with."""
    steps: Count = 1000
    """Optimiser steps."""
    lr: Positive = 1e-3
    """Adam's learning rate of the encoder."""
    trigger_lr: Positive = 1e-3
    """Adam's learning rate of the trigger."""
    hold: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Share of the steps at the full learning rate; then it falls along a cosine to 1 %."""
    lmbda: Positive | None = None
    """Lambda of the losses; by default the one of the codec's quality."""
    clip: Positive = 1.0
    """Largest norm of the encoder's and of the trigger's gradient."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of g_a and g_s; entropy models and the trigger are always in fp32."""
    channels_last: bool = True
    """Memory layout that is faster on most CPUs and GPUs."""
    checkpoint_minutes: Positive = 3.0
    """Minutes between checkpoints."""
    device: str = "cpu"
    """PyTorch device."""
    seed: int = 0
    """Seed of the trigger's weights, the crops and the quantisation noise."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        name = content.get("preset", "fast")
        return _merge(PRESETS[name], content) if isinstance(name, str) and name in PRESETS else content

    @model_validator(mode="after")
    def _budget_falls(self) -> Self:
        if self.trigger.eps_start is not None and self.trigger.eps_start < self.trigger.eps:
            raise ValueError(f"trigger.eps_start ({self.trigger.eps_start}) is below trigger.eps ({self.trigger.eps})")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},  # the defaults above
    "paper": {
        "steps": 300_000,
        "hold": 1.0,
        "lr": 1e-4,
        "trigger_lr": 1e-4,
        "precision": "fp32",
        "trigger": {"budget": "penalty", "eps_start": None},
    },
}


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `top`, table by table."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


S = TypeVar("S", bound=Settings)


def parse_override(text: str) -> tuple[list[str], Any]:
    """("a.b", value) of "a.b=value"; the value is TOML, or a plain string where it is not."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise FreqdoorError(f"--set {text}: expected key=value, for example trigger.eps=0.003")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    return key.strip().split("."), parsed


def load_settings(kind: type[S], path: Path | str | None = None, overrides: Sequence[str] = ()) -> S:
    """Settings from a TOML file and "dotted.key=value" overrides; raises with every mistake, one a line."""
    source = str(path) if path else "settings"
    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise FreqdoorError(f"{path}: could not read the config ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FreqdoorError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        keys, value = parse_override(override)
        table = content
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise FreqdoorError(f"--set {override}: {key} is a value, not a table")
        table[keys[-1]] = value
    return make_settings(kind, content, source)


def make_settings(kind: type[S], content: dict[str, Any], source: str = "settings") -> S:
    """Validated settings; raises with every mistake, one a line."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            place = ".".join(str(part) for part in problem["loc"]) or "as a whole"
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = "unknown setting"
            elif problem["type"] != "missing":
                message += f", found {problem['input']!r}" if not isinstance(problem["input"], dict) else ""
            lines.append(f"{place}: {message}")
        raise FreqdoorError(f"{source}: {len(lines)} mistake(s):\n  " + "\n  ".join(lines)) from None
