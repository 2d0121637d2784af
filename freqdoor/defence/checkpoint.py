"""What is wrong with a codec's file and with its weights, and the codec that there is when they are mended."""

import string
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compressai.entropy_models import EntropyBottleneck, EntropyModel
from compressai.layers import MaskedConv2d
from torch import Tensor, nn

from freqdoor.codecs.adapter import Codec, build_network
from freqdoor.codecs.architectures import ARCHITECTURES, LAMBDAS, VARIABLE_RATE, CodecSpec, parse_name
from freqdoor.codecs.coding import tables_of
from freqdoor.codecs.loading import (
    checked_spec,
    fitting_spec,
    load_state,
    not_finite,
    read_stored,
    renamed,
    renew_tables,
    shapes_of,
)
from freqdoor.codecs.pickles import CodeInPickle, code_in
from freqdoor.codecs.protocol import two_faced
from freqdoor.codecs.signed import check_signed
from freqdoor.codecs.sizes import TABLES as ANY_SIZE
from freqdoor.codecs.sizes import Shapes, check_table_sizes
from freqdoor.codecs.state import Stored, bare, prefix_of
from freqdoor.defence.symptoms import Symptom, listed, symptom
from freqdoor.errors import FreqdoorError
from freqdoor.limits import file_size

PARTS = (  # of codecs, as their state dicts begin; everything else is left out
    *("g_a", "g_s", "h_a", "h_s", "entropy_bottleneck", "gaussian_conditional", "context_prediction"),
    *("entropy_parameters", "latent_codec", "Gain"),
)
OTHER_FILES = {  # first bytes -> what such a file is
    b"version https://git-lfs": "a pointer of Git LFS, which stands for the file (git lfs pull gets it)",
    b"<!doctype html": "a web page, as of a download that was refused",
    b"<html": "a web page, as of a download that was refused",
    b"\x89png": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x1f\x8b": "a gzip archive (unpack it first)",
    b"\xfd7zxz": "an xz archive (unpack it first)",
    b"\x89hdf": "an HDF5 file",
    b"%pdf": "a PDF file",
    b"afqdr": "a picture that freqdoor compressed",
}
CUT = (  # words of zipfile, pickletools, PyTorch and safetensors where a file ends too early
    *("not a zip file", "central directory", "exhausted", "not enough data", "EOF", "no newline found"),
    *("ran out of input", "incomplete metadata", "IncompleteBuffer", "expected a header of at most"),
)
OVERSIZED = ("claim to be", "without compression", "data.pkl of at most")  # words of ours where a file asks for memory
TEXT = string.printable.lower().encode()
FRAMEWORKS = ("numpy", "torch")  # what else they have in them runs programs too
DATA = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.dtype", "numpy.ndarray", "torch.nn.modules")
OBJECTS = ("argparse.Namespace", "collections.", "pathlib.", "datetime.", "types.SimpleNamespace", "decimal.", "uuid.")
HALVES = (torch.float16, torch.bfloat16)
MANY = 256  # weights of a layer from which on it is said what they look like
ZEROS = 0.05  # share of a layer's weights; trained ones are never exactly 0
LEVELS = 1024  # of a layer's weights; one that was rounded to 16 bits has more
FEW = 4  # weights of a layer to one level, from which on they look quantised
NEAREST = 0.5  # share of an architecture's tensors that a file must have to be called damaged and not another network
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class Patient(NamedTuple):
    """A checkpoint as far as it could be read."""

    architecture: str | None
    net: nn.Module | None  # with its weights; None where there is none that they fit
    codec: Codec | None  # over the network; None where it does not follow the protocol
    raw: dict[str, Tensor]  # the weights as the file has them, under the network's names
    found: list[Symptom]
    keeps_tables: bool = False  # whether freqdoor wrote it: then its tables are those of the machine that did


def read_file(path: Path, name: str | None) -> Patient:
    """A checkpoint's file, read without running anything of it.

    Args:
        name: of the codec that it should be, if the user gave one.

    Raises:
        FreqdoorError: nothing there, or a device.
    """
    file_size(path, "a checkpoint file")
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            stored, header = read_stored(path)
    except FreqdoorError as error:
        return _without_network([refusal(path, error)])
    found = [symptom("checksum", path.name, sentence(warning.message, path)) for warning in heard]
    try:
        check_signed(path)
    except FreqdoorError as error:
        found.append(symptom("checksum", path.name, sentence(error, path)))
    try:
        prefix = "" if header is not None else prefix_of(stored.state, path)
    except FreqdoorError as error:
        row = symptom("not-a-codec", path.name, sentence(error, path), "save one of them alone")
        return _without_network([*found, row])
    raw = {key.removeprefix(prefix): value for key, value in stored.state.items() if key.startswith(prefix)}
    known = name is None or parse_name(name).architecture in ARCHITECTURES
    if header is None:
        found += wrapping(stored, prefix, path)
    others = [key for key in raw if key.partition(".")[0] not in PARTS]
    if header is None and known and len(others) < len(raw) and others:
        raw = {key: value for key, value in raw.items() if key not in others}
        found.append(symptom("leftovers", others, f"{listed(others)}: no part of a codec"))
    state = bare(raw, path)
    spec, more = spec_of(state, path, name, header)
    found += [*more, *numbers(raw)]
    if spec is None:
        return _without_network(found)._replace(raw=raw)
    patient = with_weights(spec, state, found, raw)
    if header is not None and patient.codec is not None:
        patient.codec.metadata = {key: value for key, value in header.items() if key not in ("kind", "spec")}
    return patient._replace(keeps_tables=header is not None)


def _without_network(found: list[Symptom]) -> Patient:
    return Patient(None, None, None, {}, found)


def sentence(error: object, path: Path) -> str:
    """What an error or a warning says of a file, without the file's name."""
    return str(error).removeprefix(f"{path}: ")


def refusal(path: Path, error: FreqdoorError) -> Symptom:
    """Why a file could not be read: code in it, its end is missing, it is something else, or what the reader says."""
    names, said = code_in(path), sentence(error, path)
    try:
        with path.open("rb") as file:
            head = file.read(64).lower()
    except OSError as problem:
        return symptom("unreadable", path.name, f"the system does not let it be read: {problem.strerror}")
    if names:
        hostile = [name for name in names if not is_object(name)]
        if hostile:
            return symptom(
                "hostile",
                names,
                f"hostile: to load it as a pickle would run {listed(hostile)}, which no weights need; nothing was run",
            )
        return symptom(
            "code", names, f"it holds objects of a program and not weights alone ({listed(names)}); nothing was run"
        )
    if not head:
        return symptom("not-a-checkpoint", path.name, "the file is empty")
    for start, kind in OTHER_FILES.items():
        if head.lstrip().startswith(start):
            return symptom("not-a-checkpoint", path.name, f"the file is {kind}")
    if isinstance(error, CodeInPickle) and head.startswith((b"\x80", b"pk\3\4")):
        return symptom("code", path.name, f"{said}; nothing was run")
    if head.startswith((b"\x80", b"pk\3\4")) or head[8:9] == b"{":
        kinds = {"truncated": CUT, "oversized": OVERSIZED}
        what = next((kind for kind, words in kinds.items() if any(word in said for word in words)), "unreadable")
        return symptom(what, path.name, said)
    if all(byte in TEXT for byte in head):
        return symptom("not-a-checkpoint", path.name, "the file is a text")
    return symptom("not-a-checkpoint", path.name, said)


def is_object(name: str) -> bool:
    """Whether "module.name" is what training programs leave in checkpoints: arrays, settings, classes of libraries.

    All else of the standard library, NumPy and PyTorch, such as os.system, has no place in one.
    """
    if name.startswith((*DATA, *OBJECTS)):
        return True
    top = name.partition(".")[0]
    return top not in (*sys.stdlib_module_names, "__builtin__", *FRAMEWORKS) or top == "__main__"


def wrapping(stored: Stored, prefix: str, path: Path) -> Iterator[Symptom]:
    """What a state dict lies in."""
    if stored.wrappers:
        beside = f", beside {listed(stored.beside)}" if stored.beside else ""
        yield symptom(
            "wrapper", path.name, f"a training's state: the weights lie under {' / '.join(stored.wrappers)}{beside}"
        )
    if prefix:
        others = [key for key in stored.state if not key.startswith(prefix)]
        left = f", and there is more beside it ({listed(others)})" if others else ""
        yield symptom(
            "prefix", prefix[:60], f'"{prefix[:60]}" of a wrapper stands before every name of the network{left}'
        )


def numbers(raw: dict[str, Tensor]) -> Iterator[Symptom]:
    """What the numbers of a state dict are stored as, and whether they are numbers."""
    if bad := not_finite(bare(raw, Path())):
        yield symptom("not-finite", bad, f"{listed(bad)}: NaN or infinite")
    kinds: dict[str, Callable[[Tensor], bool]] = {
        "half-precision": lambda value: value.dtype in HALVES,
        "double-precision": lambda value: value.dtype == torch.float64,
    }
    for what, belongs in kinds.items():
        if names := [key for key, value in raw.items() if belongs(value)]:
            dtype = str(raw[names[0]].dtype).removeprefix("torch.")
            yield symptom(what, names, f"{len(names)} of {len(raw)} tensors are stored as {dtype}: {listed(names)}")
    weights = {key: value for key, value in raw.items() if key.endswith((".weight", ".bias", ".quantiles"))}
    if whole := [key for key, value in weights.items() if not value.is_floating_point()]:
        yield symptom("whole-numbers", whole, f"{listed(whole)}: weights stored as whole numbers")


def spec_of(
    state: dict[str, Tensor], path: Path, name: str | None, header: dict[str, Any] | None
) -> tuple[CodecSpec | None, list[Symptom]]:
    """What network the weights are of, by the file's header or by their shapes, and how it differs from the name's."""
    wanted = parse_name(name) if name else None
    if wanted and wanted.architecture not in ARCHITECTURES:  # the user's own code
        return wanted, []
    if header is not None:
        if header.get("kind") != "codec":
            kind = str(header.get("kind", "something unknown"))[:40]
            return None, [
                symptom(
                    "not-a-codec",
                    path.name,
                    f"it says that it is a {kind}, and not a whole codec",
                    "pass the codec that it was planted in, and audit the two together",
                )
            ]
        try:
            spec = checked_spec(header.get("spec"), path, None)
        except FreqdoorError as error:
            what = "not-a-codec" if "code of its own" in str(error) else "header"
            return None, [symptom(what, path.name, sentence(error, path))]
        share, misfit = difference(spec, state)
        found = [] if share == 1 else [misfit]
        if wanted and wanted.architecture != spec.architecture:
            found.append(_other_architecture(wanted.architecture, [spec], path))
            wanted = None
        return (spec if share == 1 else None), [*found, *_width(wanted, spec, path)]
    draft = wanted or CodecSpec(name=path.name, architecture="")
    candidates = [wanted.architecture] if wanted else list(ARCHITECTURES)
    own = next((fit for a in candidates if (fit := fitting_spec(a, state, draft)) is not None), None)
    if own is not None:
        return own, [*_old_keys(own, state), *_width(wanted, own, path)]
    fits = [fit for a in ARCHITECTURES if (fit := fitting_spec(a, state, draft)) is not None] if wanted else []
    if fits and wanted:
        return fits[0], [_other_architecture(wanted.architecture, fits, path), *_old_keys(fits[0], state)]
    if "Gain" in state:
        return None, [symptom("not-a-codec", path.name, VARIABLE_RATE)]
    return None, [nearest(draft, state)]


def _other_architecture(wanted: str, fits: list[CodecSpec], path: Path) -> Symptom:
    names = [name_that_fits(spec) for spec in fits]
    return symptom(
        "architecture",
        path.name,
        f"the weights do not fit {wanted}; they are of {' or '.join(names)}",
        f"name {' or '.join(names)} instead" if all(":" in name for name in names) else "pass the file without a name",
    )


def _old_keys(spec: CodecSpec, state: dict[str, Tensor]) -> list[Symptom]:
    own = shapes_of(spec) or {}
    old = [key for key in state if key not in own]
    if not old:
        return []
    [first] = renamed({old[0]: state[old[0]]}, own)
    return [symptom("old-keys", old, f"{len(old)} tensors have names of an older CompressAI: {old[0]} is {first} now")]


def _width(wanted: CodecSpec | None, spec: CodecSpec, path: Path) -> list[Symptom]:
    """Whether the widths are those of the quality that was named."""
    if wanted is None or not wanted.arguments or wanted.arguments == spec.arguments:
        return []
    fits = name_that_fits(spec)
    return [
        symptom(
            "width",
            path.name,
            f"{wanted.name} has {_shown(wanted.arguments)}, the weights have {_shown(spec.arguments)}",
            f"name {fits} instead" if ":" in fits else f"none of its qualities has these widths: it is {fits}",
        )
    ]


def _sized(spec: CodecSpec) -> str:
    return f"{spec.architecture} with {_shown(spec.arguments)}" if spec.arguments else spec.architecture


def _shown(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in arguments.items())


def name_that_fits(spec: CodecSpec) -> str:
    """ "architecture:quality" of the lowest quality with these widths, and the highest; the widths where none has."""
    rows = {quality: parse_name(f"{spec.architecture}:{quality}").arguments for quality in LAMBDAS}
    fits = [quality for quality, arguments in rows.items() if arguments and arguments == spec.arguments]
    if not fits:
        return _sized(spec)
    span = f" to {max(fits)}" if len(fits) > 1 else ""
    return f"{spec.architecture}:{min(fits)}{span}"


def nearest(draft: CodecSpec, state: dict[str, Tensor]) -> Symptom:
    """In what a state dict differs from the draft's architecture, or from the one that it is nearest to."""
    specs = [draft] if draft.architecture else []
    for architecture in [draft.architecture] if draft.architecture else ARCHITECTURES:
        choices = [parse_name(f"{architecture}:1").arguments]
        with suppress(KeyError, IndexError, ValueError, TypeError):
            choices.append(ARCHITECTURES[architecture].arguments(state))
        specs += [CodecSpec(name=draft.name, architecture=architecture, arguments=choice) for choice in choices]
    share, row = max((difference(spec, state) for spec in specs), key=lambda pair: pair[0])
    if share >= NEAREST or draft.architecture:
        return row
    said = f"its {len(state)} tensors ({listed(state)}) are of no architecture that is known by name"
    return symptom("not-a-codec", listed(state, 1), said)


def difference(spec: CodecSpec, state: dict[str, Tensor]) -> tuple[float, Symptom]:
    """The share of tensors that are as the spec has them, coding tables left out, and a row for those that are not."""
    shapes: Shapes = {}
    with suppress(RuntimeError, ValueError, TypeError, FreqdoorError):  # arguments that do not go together
        shapes = shapes_of(spec) or {}
    shapes = {key: shape for key, shape in shapes.items() if not key.endswith(ANY_SIZE)}
    own = {key: value for key, value in renamed(state, shapes).items() if not key.endswith(ANY_SIZE)}
    rows = {
        "missing": [key for key in shapes if key not in own],
        "unexpected": [key for key in own if key not in shapes],
        "of another shape": [key for key, shape in shapes.items() if key in own and own[key].shape != shape],
    }
    others = [key for keys in rows.values() for key in keys]
    said = "; ".join(f"{what}: {listed(keys)}" for what, keys in rows.items() if keys)
    share = 1 - len(others) / max(len(shapes.keys() | own.keys()), 1) if shapes else 0.0
    return share, symptom("shapes", others, f"it is no whole {_sized(spec)}: {said}")


def with_weights(
    spec: CodecSpec, state: dict[str, Tensor] | None, found: list[Symptom], raw: dict[str, Tensor] | None = None
) -> Patient:
    """The network of a spec with the weights of a state dict, or with its own."""
    patient = Patient(spec.architecture, None, None, raw or {}, found)
    try:
        net = build_network(spec)
        if not isinstance(net, nn.Module):
            Codec(net, spec)  # which says what is wrong with it
        if state is None:
            patient = patient._replace(raw=dict(net.state_dict()))
            found += numbers(patient.raw)
    except FreqdoorError as error:
        found.append(symptom("protocol", spec.architecture, str(error)))
        return patient
    patient = patient._replace(net=net)
    faces = dict(two_faced(net))
    if faces:
        said = listed(f"{path} ({kind})" for path, kind in faces.items())
        found.append(symptom("two-faced", faces, f"{said}: behaves differently in train and eval mode"))
    else:
        try:
            patient = patient._replace(codec=Codec(net, spec))
        except FreqdoorError as error:
            found.append(symptom("protocol", spec.architecture, str(error)))
            return patient
    if state is not None:
        try:
            load_state(net, state)
        except (RuntimeError, KeyError, ValueError) as error:
            first = " ".join(str(error).split())[:160]
            found.append(symptom("shapes", spec.architecture, f"the weights do not fit {spec.architecture} ({first})"))
            return patient._replace(net=None, codec=None)
    return patient


def tables(codec: Codec, raw: dict[str, Tensor], *, keep: bool) -> Iterator[Symptom]:
    """What is wrong with a codec's coding tables; afterwards they are those of its weights.

    Args:
        keep: leave good ones as they are, and not as this machine rounds them.
    """
    models = {name: module for name, module in codec.net.named_modules() if isinstance(module, EntropyModel)}
    bad: dict[str, str] = {}
    missing = []
    for name, model in models.items():
        if model._offset.numel() == model._quantized_cdf.numel() == 0:
            missing.append(name)
            continue
        try:
            tables_of(model)
        except FreqdoorError as error:
            bad[name] = str(error)
    if missing:
        yield symptom("no-tables", missing, f"{listed(missing)}: no coding tables, so that it cannot compress")
    for name, said in bad.items():
        yield symptom("bad-tables", name, f"{name}: {said}; CompressAI's own coder may crash with such tables")
    if not_finite(raw):
        return
    before = {key: value.clone() for key, value in codec.net.state_dict().items()}
    try:
        check_table_sizes(codec.net)
    except FreqdoorError as error:
        yield symptom("absurd-tables", list(models), str(error))
        return
    try:
        stale = [name for name in renew_tables(codec) if name not in bad]
    except FreqdoorError as error:
        yield symptom("protocol", "update", str(error))
        return
    if stale:
        yield symptom("stale-tables", stale, f"{listed(stale)}: the coding tables are not those of the weights")
    elif keep and not missing and not bad:
        load_state(codec.net, before)


def looks(net: nn.Module, raw: dict[str, Tensor]) -> Iterator[Symptom]:
    """What the weights look like: constant, pruned, quantised, rounded, or never trained."""
    rows: dict[str, dict[str, float]] = {"constant": {}, "pruned": {}, "quantised": {}, "rounded": {}}
    layers = {name: module for name, module in net.named_modules() if isinstance(module, LAYERS)}
    for name, layer in layers.items():
        w = layer.weight.detach().float()
        w = w[layer.mask.bool()] if isinstance(layer, MaskedConv2d) else w.flatten()
        if not w.isfinite().all() or w.numel() < 2:
            continue
        if bool((w == w[0]).all()):
            rows["constant"][name] = float(w[0])
        if w.numel() < MANY or name in rows["constant"]:
            continue
        zeros = float((w == 0).float().mean())
        w = w[w != 0]
        levels = len(torch.unique(w))
        halves = any(bool((w == w.to(half).float()).all()) for half in HALVES)
        if levels <= len(w) / FEW and (levels <= LEVELS or not halves):
            rows["quantised"][name] = levels  # of which 0 is one
            continue
        if zeros >= ZEROS:
            rows["pruned"][name] = zeros
        if halves and raw.get(f"{name}.weight", w).dtype not in HALVES:  # those are said already
            rows["rounded"][name] = levels
    said = {
        "constant": "all their weights are the same number",
        "pruned": f"up to {100 * max(rows['pruned'].values(), default=0):.0f} % of their weights are exactly 0",
        "quantised": f"their weights have at most {max(rows['quantised'].values(), default=0):.0f} different values",
        "rounded": "their weights are float32 that were rounded to 16 bits",
    }
    for what, names in rows.items():
        if names:
            yield symptom(what, names, f"{listed(names)}: {said[what]}")
    models = {name: module for name, module in net.named_modules() if isinstance(module, EntropyBottleneck)}
    fresh = [name for name, m in models.items() if _as_made(m)]
    if fresh:
        yield symptom("quantiles", fresh, f"{listed(fresh)}: its quantiles were never trained")


def _as_made(model: EntropyBottleneck) -> bool:
    """Whether a bottleneck's quantiles are those that CompressAI's constructor gives."""
    first = torch.tensor([-model.init_scale, 0.0, model.init_scale])
    return bool((model.quantiles.detach().reshape(-1, 3) == first).all())
