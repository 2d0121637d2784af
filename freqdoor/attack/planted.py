"""What planting leaves behind: a planted encoder as a file, written with its proof and read with distrust."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from freqdoor.attack.settings import TRIGGER_NAME, CodecSource, ObjectiveSettings, PlantSettings
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.architectures import ARCHITECTURES, CodecSpec
from freqdoor.codecs.loading import check_weights, load_codec, read_tensors, save_codec, write_tensors
from freqdoor.codecs.signed import check_signed
from freqdoor.codecs.sizes import check_shapes, outline
from freqdoor.errors import FreqdoorError
from freqdoor.files import write_text
from freqdoor.samples import ASSETS, SHIPPED
from freqdoor.settings import public
from freqdoor.triggers.base import Trigger
from freqdoor.triggers.build import build_trigger
from freqdoor.types import Result, Role, check_choice, problem_of

PLANTED = "planted.safetensors"
MANIFEST = "manifest.json"
KIND = "planted encoder"  # what the file says that it holds
Scope = Literal["g_a", "g_a+h_a"]
LONGEST = 2**40  # seconds and steps that a header may claim
MOST_ATTACKS = 64


class PlantedAttack(Result):
    """One trigger of a planted encoder: what it was trained for, and how to rebuild it."""

    name: Annotated[str, Field(pattern=f"^{TRIGGER_NAME}$")]
    objective: ObjectiveSettings
    preset: str
    trigger: str  # a key of TRIGGERS
    arguments: dict[str, Any]  # of the trigger's constructor

    @field_validator("arguments")
    @classmethod
    def _finite(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        json.dumps(arguments, allow_nan=False)  # ValueError
        return arguments


class Planting(Result):
    """The settings of a planting as they travel, all of them kept; those that others ask for are named here."""

    model_config = ConfigDict(extra="allow")

    codec: CodecSource
    steps: Annotated[int, Field(ge=0, le=LONGEST)]
    seconds: Annotated[float, Field(ge=0, le=LONGEST, allow_inf_nan=False)]


class Header(Result):
    """What a planted encoder's file says of itself."""

    schema_version: Literal[1] = 1
    tampered: bool = True
    attacks: Annotated[tuple[PlantedAttack, ...], Field(max_length=MOST_ATTACKS)]
    scope: Scope
    base: CodecSpec  # of the vanilla codec
    modules_before: dict[str, str]  # SHA-256 of the vanilla codec's modules
    modules_after: dict[str, str]
    planting: Planting


@dataclass(frozen=True)
class Planted:
    """A vanilla codec, the same codec with a tampered encoder, and the triggers that open it."""

    vanilla: Codec
    tampered: Codec
    triggers: dict[str, Trigger]
    header: Header

    def codec(self, role: Role) -> Codec:
        """The codec with the encoder of this role; FreqdoorError if there is no such role."""
        check_choice("role", role, Role)
        return self.tampered if role == "tampered" else self.vanilla

    def named(self, trigger: str | None = None) -> str:
        """The name of a trigger, by default the first; FreqdoorError lists those there are."""
        name = trigger or next(iter(self.triggers), None)
        if name is None or name not in self.triggers:
            raise FreqdoorError(f"trigger {name!r}: this encoder has {', '.join(self.triggers) or 'none'}")
        return name

    def attack(self, name: str) -> PlantedAttack:
        """What the header says of a trigger; FreqdoorError if there is no such trigger."""
        return next(attack for attack in self.header.attacks if attack.name == self.named(name))

    def objective(self, name: str) -> ObjectiveSettings:
        """The settings of the objective that a trigger was trained for."""
        return self.attack(name).objective


def unplanted(vanilla: Codec) -> Planted:
    """A codec that nothing was planted in, where one with triggers is expected: a table's first row."""
    hashes = vanilla.module_hashes()
    header = Header(
        tampered=False,
        attacks=(),
        scope="g_a",
        base=vanilla.spec,
        modules_before=hashes,
        modules_after=hashes,
        planting=Planting(codec=CodecSource(name=vanilla.spec.name), steps=0, seconds=0),
    )
    return Planted(vanilla, vanilla, {}, header)


def export(
    folder: Path,
    settings: PlantSettings,
    vanilla: Codec,
    tampered: Codec,
    triggers: Sequence[Trigger],
    history: Mapping[str, Any],
) -> Planted:
    """Write what was planted into a run's folder, with the proof that nothing outside the scope has changed.

    Args:
        triggers: one for each of `settings.planned`, in its order.
        history: of the run: its seconds, and lambda and learning rate where the settings left them open.
    """
    before, after = vanilla.module_hashes(), tampered.module_hashes()
    changed = [name for name in before if before[name] != after[name]]
    outside = set(changed) - set(settings.scope.split("+"))
    if outside:
        raise FreqdoorError(f"{', '.join(outside)} changed while planting in {settings.scope}: this is a defect")
    attacks = [
        {
            "name": attack.name,
            "objective": public(attack.objective),
            "preset": settings.preset,
            "trigger": attack.trigger.name,
            "arguments": trigger.arguments,
        }
        for attack, trigger in zip(settings.planned, triggers, strict=True)
    ]
    header = Header(
        attacks=attacks,
        scope=settings.scope,
        base=vanilla.spec,
        modules_before=before,
        modules_after=after,
        planting=public(settings)
        | {"seconds": round(history["seconds"]), "lmbda": history["lmbda"], "lr": history["lr"]},
    )
    tensors = {
        f"{name}.{key}": value
        for name in settings.scope.split("+")
        for key, value in tampered.part(name).state_dict().items()
    }
    named = {attack.name: trigger for attack, trigger in zip(settings.planned, triggers, strict=True)}
    for name, trigger in named.items():
        tensors |= {f"trigger.{name}.{key}": value for key, value in trigger.state_dict().items()}
    content = json.loads(header.model_dump_json())
    header = Header.model_validate(content)  # as whoever reads the file has it: a tuple comes back as a list
    write_tensors(folder / PLANTED, tensors, {"kind": KIND, **content})
    save_codec(tampered, folder / "codec.safetensors", tampered=True, attacks=content["attacks"])
    write_text(folder / MANIFEST, json.dumps({"before": before, "after": after, "changed": changed}, indent=2))
    tampered.metadata = {"tampered": True, "attacks": content["attacks"]}
    return Planted(vanilla, tampered, named, header)


def opened(
    planted: Planted | Path | str, codec: Codec | str | None = None, weights: Path | str | None = None
) -> Planted:
    """A planted encoder as it is, or loaded by its name as `load_planted` does."""
    return planted if isinstance(planted, Planted) else load_planted(planted, codec, weights)


def load_planted(path: Path | str, codec: Codec | str | None = None, weights: Path | str | None = None) -> Planted:
    """A planted encoder with its triggers and the vanilla codec that it was planted in.

    Args:
        path: planted.safetensors, the run directory that holds it, or the name of an encoder that comes with the
            package: planted-bpp, planted-psnr or planted-face.
        codec, weights: the vanilla codec, loaded or as for `load_codec`. May be left out where the file names a
            published or bundled one; code and files that a stranger's header names are never loaded.

    Raises:
        FreqdoorError: not such a file, a header that does not fit its weights, or another vanilla codec.
    """
    path, tensors, content = _read(path)
    header = _checked_header(content, path)
    base = header.planting.codec
    if codec is None and (base.weights or base.name.partition(":")[0] not in ARCHITECTURES):
        raise FreqdoorError(f"{path}: was planted in {base.name}; name that codec with --codec (and --weights)")
    vanilla = codec if isinstance(codec, Codec) else load_codec(codec or base.name, weights, multiple=base.multiple)
    _check_hashes(vanilla, header.modules_before, f"{path}: was planted in {base.name} with other weights")
    tampered = copy.deepcopy(vanilla)
    with _malformed(path):
        for module in header.scope.split("+"):
            tampered.part(module).load_state_dict(_part(tensors, module))
        _check_hashes(tampered, header.modules_after, f"{path}: does not hold the weights that its header names")
        check_weights(tensors, path)
        triggers = _triggers(tensors, header)
    tampered.metadata = {"tampered": True, "attacks": content["attacks"]}
    return Planted(vanilla, tampered, triggers, header)


def read_planted(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a planted encoder's file as they stand there; the path is `load_planted`'s."""
    return _read(path)[1:]


def load_triggers(path: Path | str) -> dict[str, Trigger]:
    """The triggers of a planted encoder's file by their names, without any codec; the path is `load_planted`'s.

    Raises:
        FreqdoorError: not such a file, or a header that does not fit its weights.
    """
    path, tensors, content = _read(path)
    header = _checked_header(content, path)
    with _malformed(path):
        check_weights(tensors, path)
        return _triggers(tensors, header)


def _read(path: Path | str) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Where a planted encoder's file is, its tensors, and its header as it stands there."""
    path = Path(path)
    path = path / PLANTED if path.is_dir() else path
    path = ASSETS / f"{path}.safetensors" if str(path) in SHIPPED and not path.exists() else path
    check_signed(path)
    return (path, *read_tensors(path))


@contextmanager
def _malformed(path: Path) -> Iterator[None]:
    """What a file's tensors and header make fail in the block is one sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FreqdoorError(f"{path}: malformed planted encoder ({type(error).__name__}: {reason})") from None


def _triggers(tensors: dict[str, Tensor], header: Header) -> dict[str, Trigger]:
    """Every trigger that a header names, from its tensors."""
    return {attack.name: _trigger(attack, _part(tensors, f"trigger.{attack.name}")) for attack in header.attacks}


def _checked_header(content: dict[str, Any], path: Path) -> Header:
    """The header of a file that a stranger may have written."""
    if content.get("kind") != KIND:
        raise FreqdoorError(f"{path}: expected a planted encoder ({PLANTED}), found another kind of file")
    if content.get("scope") not in get_args(Scope):
        raise FreqdoorError(f"{path}: malformed header: unknown scope {str(content.get('scope'))[:40]!r}")
    try:
        header = Header.model_validate(content)
    except (ValidationError, RecursionError) as error:
        reason = problem_of(error) if isinstance(error, ValidationError) else "nested too deeply"
        raise FreqdoorError(f"{path}: malformed planted encoder ({reason})") from None
    names = [attack.name for attack in header.attacks]
    if not names or len(set(names)) < len(names):
        raise FreqdoorError(f"{path}: malformed planted encoder (expected triggers of distinct names, found {names})")
    return header


def _trigger(attack: PlantedAttack, tensors: dict[str, Tensor]) -> Trigger:
    """The trigger that a header names, if the file's tensors are its own: before it takes any memory."""

    def build() -> Trigger:
        return build_trigger(attack.trigger, **attack.arguments)

    try:
        check_shapes(outline(build), tensors)
    except FreqdoorError as error:  # arguments that are none
        raise ValueError(str(error)) from None
    trigger = build()
    trigger.load_state_dict(tensors)
    return trigger.eval()


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one module, without its name in front."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _check_hashes(codec: Codec, expected: dict[str, str], message: str) -> None:
    different = [name for name, value in codec.module_hashes().items() if value != expected.get(name)]
    if different:
        raise FreqdoorError(f"{message} ({', '.join(different)} of {codec.spec.name} differ); pass the right codec")
