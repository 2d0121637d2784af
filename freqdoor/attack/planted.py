"""What planting leaves behind: a planted encoder as a file, written with its proof and read with distrust."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from freqdoor.attack.settings import ObjectiveSettings, PlantSettings
from freqdoor.codecs.adapter import ARCHITECTURES, Codec
from freqdoor.codecs.loading import check_weights, load_codec, read_tensors, save_codec, write_tensors
from freqdoor.errors import FreqdoorError
from freqdoor.files import write_text
from freqdoor.samples import ASSETS
from freqdoor.training.run import public, without_folders
from freqdoor.triggers import Trigger, build_trigger

PLANTED = "planted.safetensors"
MANIFEST = "manifest.json"
SHIPPED = ("planted-bpp", "planted-psnr", "planted-face")
SCOPES = ("g_a", "g_a+h_a")


class Planting(NamedTuple):
    """How long a planting took."""

    seconds: float
    steps: int


class Header(dict[str, Any]):
    """What a planted encoder's file says of it."""

    @property
    def planting(self) -> Planting:
        """How it was planted."""
        return Planting(self["planting"]["seconds"], self["planting"]["steps"])


@dataclass(frozen=True)
class Planted:
    """A vanilla codec, the same codec with a tampered encoder, and the triggers that open it."""

    vanilla: Codec
    tampered: Codec
    triggers: dict[str, Trigger]
    header: Header

    def codec(self, role: str) -> Codec:
        """The codec with the encoder of this role."""
        return self.tampered if role == "tampered" else self.vanilla

    def named(self, name: str | None = None) -> str:
        """The name of a trigger, by default the first; FreqdoorError lists those there are."""
        name = name or next(iter(self.triggers))
        if name not in self.triggers:
            raise FreqdoorError(f"trigger {name!r}: this encoder has {', '.join(self.triggers)}")
        return name

    def objective(self, name: str) -> ObjectiveSettings:
        """The settings of the objective that a trigger was trained for."""
        return ObjectiveSettings(**next(a["objective"] for a in self.header["attacks"] if a["name"] == name))


def unplanted(vanilla: Codec) -> Planted:
    """A codec that nothing was planted in, where one with triggers is expected: a table's first row."""
    return Planted(vanilla, vanilla, {}, Header())


def opened(planted: Planted | Path | str, codec: str | None = None, weights: Path | str | None = None) -> Planted:
    """A planted encoder as it is, or loaded by its name as `load_planted` does."""
    return planted if isinstance(planted, Planted) else load_planted(planted, codec, weights)


def export(
    folder: Path, settings: PlantSettings, vanilla: Codec, tampered: Codec, triggers: Sequence[Trigger], seconds: float
) -> Planted:
    """Write what was planted into a run's folder, with the proof that nothing outside the scope has changed.

    Args:
        triggers: one for each of `settings.planned`, in its order.
    """
    before, after = vanilla.module_hashes(), tampered.module_hashes()
    changed = [name for name in before if before[name] != after[name]]
    outside = set(changed) - set(settings.scope.split("+"))
    if outside:
        raise FreqdoorError(f"{', '.join(outside)} changed while planting in {settings.scope}: this is a defect")
    attacks = [
        {
            "name": attack.name,
            "objective": without_folders(attack.objective.model_dump()),
            "preset": settings.preset,
            "trigger": attack.trigger.name,
            "arguments": trigger.arguments,
        }
        for attack, trigger in zip(settings.planned, triggers, strict=True)
    ]
    header = {
        "tampered": True,
        "attacks": attacks,
        "scope": settings.scope,
        "base": asdict(vanilla.spec),
        "modules_before": before,
        "modules_after": after,
        "planting": public(settings) | {"seconds": round(seconds)},
    }
    tensors = {
        f"{name}.{key}": value
        for name in settings.scope.split("+")
        for key, value in tampered.part(name).state_dict().items()
    }
    named = {attack.name: trigger for attack, trigger in zip(settings.planned, triggers, strict=True)}
    for name, trigger in named.items():
        tensors |= {f"trigger.{name}.{key}": value for key, value in trigger.state_dict().items()}
    write_tensors(folder / PLANTED, tensors, {"kind": "planted encoder", **header})
    save_codec(tampered, folder / "codec.safetensors", tampered=True, attacks=attacks)
    write_text(folder / MANIFEST, json.dumps({"before": before, "after": after, "changed": changed}, indent=2))
    tampered.metadata = {"tampered": True, "attacks": attacks}
    return Planted(vanilla, tampered, named, Header(header))


def load_planted(path: Path | str, codec: str | None = None, weights: Path | str | None = None) -> Planted:
    """A planted encoder with its triggers and the vanilla codec that it was planted in.

    Args:
        path: planted.safetensors, the run directory that holds it, or the name of an encoder that comes with the
            package: planted-bpp, planted-psnr or planted-face.
        codec, weights: the vanilla codec as for `load_codec`. May be left out where the file names a published or
            bundled one; code and files that a stranger's header names are never loaded.

    Raises:
        FreqdoorError: not such a file, a header that does not fit its weights, or another vanilla codec.
    """
    path = Path(path)
    path = path / PLANTED if path.is_dir() else path
    path = ASSETS / f"{path}.safetensors" if str(path) in SHIPPED and not path.exists() else path
    tensors, header = read_tensors(path)
    if header.pop("kind", None) != "planted encoder":
        raise FreqdoorError(f"{path}: expected a planted encoder (planted.safetensors), found another kind of file")
    try:
        base, scope = header["planting"]["codec"], header["scope"]
        if codec is None and (base["weights"] or base["name"].partition(":")[0] not in ARCHITECTURES):
            raise FreqdoorError(f"{path}: was planted in {base['name']}; name that codec with --codec (and --weights)")
        if scope not in SCOPES:
            raise FreqdoorError(f"{path}: malformed header: unknown scope {scope!r}")
        vanilla = load_codec(codec or base["name"], weights)
        _check_hashes(vanilla, header["modules_before"], f"{path}: was planted in {base['name']} with other weights")
        tampered = copy.deepcopy(vanilla)
        for module in scope.split("+"):
            tampered.part(module).load_state_dict(_part(tensors, module))
        _check_hashes(tampered, header["modules_after"], f"{path}: does not hold the weights that its header names")
        check_weights(tensors, path)
        triggers = {}
        for attack in header["attacks"]:
            trigger = build_trigger(attack["trigger"], **attack["arguments"])
            trigger.load_state_dict(_part(tensors, f"trigger.{attack['name']}"))
            triggers[attack["name"]] = trigger.eval()
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FreqdoorError(f"{path}: malformed planted encoder ({type(error).__name__}: {reason})") from None
    tampered.metadata = {"tampered": True, "attacks": header["attacks"]}
    return Planted(vanilla, tampered, triggers, Header(header))


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one module, without its name in front."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _check_hashes(codec: Codec, expected: dict[str, str], message: str) -> None:
    found = codec.module_hashes()
    different = [name for name in found if found[name] != expected.get(name)]
    if different:
        raise FreqdoorError(f"{message} ({', '.join(different)} of {codec.spec.name} differ); pass the right codec")
