"""What can be wrong with a codec's checkpoint: one row each, with how bad it is and what to do."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from freqdoor.types import Result

Severity = Literal["fatal", "wrong", "note"]


class Kind(NamedTuple):
    """One thing that can be wrong."""

    severity: Severity
    remedy: str
    mended: bool = False  # whether `--fix` does it
    judged: bool = True  # whether the rest of the codec can be looked at


KINDS: dict[str, Kind] = {
    "hostile": Kind(
        "fatal",
        "load it with no program; ask its author for a safetensors file, and ask why this stands in it",
        judged=False,
    ),
    "code": Kind(
        "fatal",
        "ask for net.state_dict() alone, or for a safetensors file, from the program that wrote this one",
        judged=False,
    ),
    "truncated": Kind("fatal", "get the file again, and compare its size with the source's", judged=False),
    "not-a-checkpoint": Kind("fatal", "pass a PyTorch file of a state dict, or a safetensors file", judged=False),
    "oversized": Kind("fatal", "if nothing damaged this file it is hostile; ask its author for another", judged=False),
    "header": Kind("fatal", "if nothing damaged this file it is hostile; ask its author for another", judged=False),
    "unreadable": Kind("fatal", "get the file again, or ask for a safetensors file", judged=False),
    "not-a-codec": Kind(
        "fatal",
        "name the network's own code as package.module:factory and pass this file as --weights, if you trust that code",
        judged=False,
    ),
    "protocol": Kind("fatal", "mend the network's code, as docs/codecs.md says", judged=False),
    "checksum": Kind("wrong", "get the file again"),
    "wrapper": Kind("note", "save net.state_dict() alone, without the training's state", mended=True),
    "prefix": Kind("wrong", "save the state dict of the network inside the wrapper, as model.module", mended=True),
    "old-keys": Kind("note", "save the state dict again with a recent CompressAI", mended=True),
    "leftovers": Kind("wrong", "leave out what is no part of the codec", mended=True),
    "architecture": Kind("fatal", "name the architecture that the weights are of"),
    "width": Kind("wrong", "name the quality that the weights are of"),
    "shapes": Kind(
        "fatal",
        "ask for a checkpoint that is whole; where the network is another one, name its code as package.module:factory",
    ),
    "not-finite": Kind("fatal", "go back to a checkpoint from before the training diverged"),
    "whole-numbers": Kind("fatal", "ask for the weights as float32: their scales are not in the file"),
    "half-precision": Kind("note", "save float32 weights, and compute the coding tables from these", mended=True),
    "double-precision": Kind("note", "save float32 weights", mended=True),
    "rounded": Kind("note", "ask for the weights in full precision, if there are any"),
    "constant": Kind("wrong", "go back to a checkpoint in which these layers were trained"),
    "pruned": Kind("note", "ask what the weights were pruned for, and audit the encoder"),
    "quantised": Kind("note", "ask for the weights in full precision, and audit the encoder"),
    "quantiles": Kind("note", "train with the auxiliary loss, net.aux_loss(), and its own optimiser"),
    "no-tables": Kind("wrong", "call net.update() before the state dict is saved", mended=True),
    "bad-tables": Kind(
        "wrong",
        "compute the coding tables from the weights, net.update(force=True); if nothing damaged them, they are hostile",
        mended=True,
    ),
    "stale-tables": Kind(
        "wrong",
        "call net.update(force=True) before the state dict is saved; files that the old tables wrote need these",
        mended=True,
    ),
    "absurd-tables": Kind("fatal", "go back to a checkpoint from before the damage; if nothing did any, it is hostile"),
    "two-faced": Kind("fatal", "replace these modules: dropout by nn.Identity, batch normalisation by what it learned"),
    "modes": Kind("wrong", "train with what eval mode does: rounding, or noise of the same strength"),
    "decoder": Kind("wrong", "let compress and decompress code the latents that forward rounds"),
    "rate": Kind("wrong", "compute the tables and the likelihoods from the same weights, and train with the latter"),
    "rough-rate": Kind("note", "measure real bytes; after longer training the scales are predicted better"),
    "threads": Kind("wrong", "let the decoder compute nothing that depends on the number of threads"),
    "picture": Kind("wrong", "check that this checkpoint was trained, and of which architecture it is"),
    "dead-channels": Kind("note", "nothing has to be done; a narrower network would do the same"),
}


class Symptom(Result):
    """One thing that is wrong with a checkpoint."""

    what: str  # a key of KINDS
    severity: Severity
    where: tuple[str, ...]  # tensors, modules or the file
    said: str
    remedy: str

    @property
    def mended(self) -> bool:
        """Whether `--fix` mends it."""
        return KINDS[self.what].mended


def symptom(what: str, where: str | Iterable[str], said: str, remedy: str | None = None) -> Symptom:
    """A row of its kind; with a remedy of its own where there is a better one than the kind's."""
    kind = KINDS[what]
    places = (where,) if isinstance(where, str) else tuple(where)
    return Symptom(what=what, severity=kind.severity, where=places, said=said, remedy=remedy or kind.remedy)


def listed(places: Iterable[str], most: int = 3) -> str:
    """The first of several names and how many there are besides; names of a stranger's file are cut."""
    names = [name[:60] for name in places]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
