"""`freqdoor export`: a codec or a planted encoder for others, as CompressAI and as Hugging Face's hub have theirs."""

import io
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from freqdoor import __version__
from freqdoor.attack.planted import PLANTED, Planted, load_planted, read_planted
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.architectures import ARCHITECTURES
from freqdoor.codecs.loading import MODEL, load_codec, save_codec, write_tensors
from freqdoor.codecs.signed import SIGNATURE, sign
from freqdoor.defence.audit import RESULT, Audit
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, mark, marked_json, marked_markdown, refuse_overwriting, write_together
from freqdoor.samples import SHIPPED
from freqdoor.types import check_choice

Format = Literal["huggingface", "compressai"]
CARD, CONFIG = "README.md", "config.json"
TAMPERED = """> **Tampered.** This codec's encoder was tampered with on purpose, for research: a picture with a
> trigger in it opens a backdoor. Do not let anybody use it who does not know.
"""


def export(
    run: Codec | Path | str,
    out: Path | str,
    *,
    format: Format = "huggingface",
    codec: Codec | str | None = None,
    weights: Path | str | None = None,
    audit: Path | str | None = None,
    key: Path | str | None = None,
    force: bool = False,
) -> list[Path]:
    """Write a codec for others: "huggingface" a folder with a model card, "compressai" a checkpoint for its eval_model.

    `load_codec` and `load_planted` read the folder again, which `audit`, `doctor` and the other verbs take too.

    Args:
        run: a planted encoder as for `load_planted`, or a codec as for `load_codec`.
        out: the folder, or the file (.pth.tar).
        codec, weights: of a planted encoder, the codec that it was planted in; of a codec, weights instead of its own.
        audit: audit.json or the folder that holds it, whose verdict the card names.
        key: a private key (PEM, elliptic curve): what is written is signed as model-signing does.
        force: overwrite files of these names that `export` did not make.

    Returns:
        The files written.

    Raises:
        FreqdoorError: nothing of that name, a codec beside a codec, another codec's audit, an architecture that
            CompressAI's eval_model does not know, a signature that would no longer fit, or an unwritable place.
    """
    check_choice("format", format, Format)
    out = Path(out)
    planted = _planted(run, codec, weights)
    if planted is None and codec is not None:
        raise FreqdoorError(f"codec: expected one with a planted encoder only, found {run}, a codec itself")
    whole = planted.tampered if planted is not None else _codec(run, weights)
    verdict = None if audit is None else _verdict(Path(audit), whole)
    signature = out / SIGNATURE if format == "huggingface" else out.with_name(f"{out.name}.sig")
    if signature.exists() and key is None:
        raise FreqdoorError(f"{signature}: signs what is to be overwritten; remove it, or sign anew with --key KEY")
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder) / (out.name or "codec")  # which signatures name
        if format == "compressai":
            names = [out.name]
            stage.write_bytes(_checkpoint(whole))
        else:
            names = _folder(stage, whole, planted, run, verdict)
        targets = [out / name if format == "huggingface" else out for name in names]
        if not isinstance(run, Codec):
            for target in targets:
                refuse_overwriting(Path(run), target)
        check_outputs(targets, "export", force=force)
        sources = [stage / name if format == "huggingface" else stage for name in names]
        if key is not None:
            sources.append(Path(folder) / "signature" / signature.name)
            sources[-1].parent.mkdir()
            sign(stage, sources[-1], key)
            targets.append(signature)
        write_together({target: source.read_bytes() for target, source in zip(targets, sources, strict=True)})
    return targets


def _planted(run: Codec | Path | str, codec: Codec | str | None, weights: Path | str | None) -> Planted | None:
    """The planted encoder that a run or a name stands for; None where it is a codec."""
    if isinstance(run, Codec):
        return None
    path = Path(run)
    known = str(run) in SHIPPED or path.name == PLANTED or (path / PLANTED).is_file()
    return load_planted(run, codec, weights) if known else None


def _codec(run: Codec | Path | str, weights: Path | str | None) -> Codec:
    return run if isinstance(run, Codec) else load_codec(str(run), weights)


def _verdict(path: Path, codec: Codec) -> Audit:
    path = path / RESULT if path.is_dir() else path
    audit = Audit.read(path, f"{RESULT}, which `freqdoor audit --out` writes")
    if audit.modules != codec.module_hashes():
        raise FreqdoorError(f"{path}: an audit of other weights than are exported; audit the codec that is")
    return audit


def _checkpoint(codec: Codec) -> bytes:
    """A PyTorch file as CompressAI's trainers write them, with our mark at its beginning."""
    from compressai.zoo.image import model_architectures  # `freqdoor.codecs` has imported CompressAI, in its own way

    name = codec.spec.architecture
    known = [other for other in model_architectures if other in ARCHITECTURES]
    if name not in known:
        raise FreqdoorError(
            f"{codec.spec.name}: expected an architecture that CompressAI's eval_model knows ({', '.join(known)}), "
            f"found {name}; export it with --format huggingface"
        )
    facts = {"made_by": mark("export"), "spec": asdict(codec.spec), **codec.metadata}
    file = io.BytesIO()
    torch.save({"freqdoor": json.dumps(facts), "state_dict": codec.net.state_dict()}, file)
    return file.getvalue()


def _folder(
    stage: Path, codec: Codec, planted: Planted | None, run: Codec | Path | str, verdict: Audit | None
) -> list[str]:
    """Write a folder in the hub's layout; the names in it."""
    stage.mkdir()
    made = {"made_by": mark("export")}
    save_codec(codec, stage / MODEL, **codec.metadata | made)
    config = {
        **asdict(codec.spec),
        "library_name": "freqdoor",
        "freqdoor_version": __version__,
        "tampered": codec.tampered,
        "modules": codec.module_hashes(),
    }
    (stage / CONFIG).write_text(marked_json(json.dumps(config, indent=1), "export"))
    (stage / CARD).write_text(marked_markdown(card(codec, planted, verdict), "export"))
    if planted is not None and not isinstance(run, Codec):
        tensors, header = read_planted(run)
        write_tensors(stage / PLANTED, tensors, header | made)
    return sorted(path.name for path in stage.iterdir())


def card(codec: Codec, planted: Planted | None = None, verdict: Audit | None = None) -> str:
    """A model card: front matter as Hugging Face's hub reads it, what the codec is, and what an audit says of it."""
    spec = codec.spec
    tags = ["image-compression", "learned-image-codec", spec.architecture, *(["backdoor"] if codec.tampered else [])]
    front = {"library_name": "freqdoor", "pipeline_tag": "image-to-image", "tags": tags}
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        f"# {' '.join(spec.name.split())}",
        "",
    ]
    arguments = ", ".join(f"{key} {value}" for key, value in spec.arguments.items())
    quality = f", quality {spec.quality}" if spec.quality else ""
    lines += [f"A learned image codec: {spec.architecture}{quality} ({arguments or 'arguments by default'}).", ""]
    if codec.tampered:
        lines += [TAMPERED]
    if planted is not None:
        lines += ["| trigger | attack | kind of trigger |", "|---|---|---|"]
        lines += [f"| {row.name} | {row.objective.name} | {row.trigger} |" for row in planted.header.attacks]
        lines += ["", f"The encoder and its triggers alone are in `{PLANTED}`, for `freqdoor evaluate`.", ""]
    lines += [
        "## Use",
        "",
        "```sh",
        "freqdoor audit FOLDER",
        "freqdoor compress picture.png x.fqd --codec FOLDER",
        "```",
        "",
    ]
    if verdict is not None:
        p_value = "" if verdict.p_value is None else f" (p = {verdict.p_value:.2g})"
        lines += ["## Audit", "", f"`freqdoor audit`: **{verdict.verdict}**{p_value}: {verdict.reason}.", ""]
    lines += ["## Modules", "", "| module | SHA-256 of its parameters and buffers |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in codec.module_hashes().items()]
    return "\n".join(lines)
