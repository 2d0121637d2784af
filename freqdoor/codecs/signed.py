"""Signatures beside checkpoints, in the format of OpenSSF's model-signing.

A signature is a Sigstore bundle whose DSSE envelope holds an in-toto statement: names of files and their SHA-256. That
the files are those of the statement is checked wherever a codec is loaded; who made it, only with the public key.
"""

import base64
import os
from pathlib import Path, PurePosixPath
from typing import Any

from freqdoor.errors import FreqdoorError
from freqdoor.files import sha256_of
from freqdoor.limits import LONGEST_HEADER, parse_json, read_whole
from freqdoor.types import Result

SIGNATURE = "model.sig"  # of a folder; of a file it is the file's own name and .sig
PREDICATE = "https://model_signing/signature/v1.0"
EXTRA = "signatures need more: pip install 'freqdoor[signing]'"


class SignatureCheck(Result):
    """Whether files are those that the owner of a key has signed."""

    signature: str  # file
    files: tuple[str, ...]  # that the signature names
    signed: bool
    reason: str

    @property
    def exit_code(self) -> int:
        """What `freqdoor verify-signature` ends with."""
        return 0 if self.signed else 1


def signature_of(path: Path) -> Path | None:
    """The signature beside a folder's files or a file; None where there is none."""
    places = [path / SIGNATURE] if path.is_dir() else [path.with_name(f"{path.name}.sig"), path.parent / SIGNATURE]
    return next((place for place in places if place.is_file()), None)


def check_signed(path: Path) -> None:
    """Raise FreqdoorError where a signature lies beside a file and the file is not what was signed."""
    signature = signature_of(path)
    if signature is None:
        return
    names = digests(signature)
    name = path.name if signature.name == SIGNATURE else "."
    if name not in names:
        raise FreqdoorError(
            f"{path}: {signature.name} beside it signs other files ({', '.join(list(names)[:5])}) and not this one; "
            "load what was signed, or move the signature away"
        )
    found = sha256_of(path)
    if found != names[name]:
        raise FreqdoorError(
            f"{path}: expected the file that {signature.name} signs (SHA-256 {names[name][:12]}), found another "
            f"({found[:12]}); get both again"
        )


def digests(signature: Path) -> dict[str, str]:
    """The files that a signature names, with their SHA-256; "." is the signed file itself.

    Raises:
        FreqdoorError: no signature of this format.
    """
    try:
        bundle: Any = parse_json(read_whole(signature, "a signature", LONGEST_HEADER), signature)
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)
        statement: Any = parse_json(payload, signature)
        if statement["predicateType"] != PREDICATE:
            raise ValueError(f"it is a statement of {str(statement['predicateType'])[:80]}")
        rows = statement["predicate"]["resources"]
        found = {str(PurePosixPath(row["name"])): str(row["digest"]) for row in rows if row["algorithm"] == "sha256"}
        if len(found) < len(rows) or not found:
            raise ValueError("expected the SHA-256 of every file")
    except (KeyError, TypeError, ValueError) as error:  # base64's too
        raise FreqdoorError(
            f"{signature}: expected a signature as model-signing writes it ({' '.join(str(error).split())[:80]}); move "
            "it away if it belongs to something else"
        ) from None
    return found


def sign(path: Path, signature: Path, key: Path | str) -> None:
    """Sign a folder's files, or a file, with a private key (PEM, elliptic curve).

    Raises:
        FreqdoorError: a key that is none, or no package model-signing.
    """
    try:
        from model_signing import hashing, signing
    except ImportError:
        raise FreqdoorError(EXTRA) from None
    try:
        ignoring = hashing.Config().set_ignored_paths(paths=[signature.name])
        config = signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(ignoring)
        config.sign(path, signature)
    except (ValueError, TypeError, OSError) as error:
        raise FreqdoorError(f"{key}: expected a private key of an elliptic curve as a PEM file ({error})") from None


def verify_signature(path: Path | str, key: Path | str, *, signature: Path | str | None = None) -> SignatureCheck:
    """Whether a codec's folder or file is what the owner of a key has signed, with nothing added and nothing left out.

    Args:
        key: the public key, a PEM file.
        signature: by default model.sig in the folder, or the file's name and .sig.

    Raises:
        FreqdoorError: no signature, a key that is none, or no package model-signing.
    """
    path = Path(path)
    beside = Path(signature) if signature is not None else signature_of(path)
    if beside is None or not os.path.exists(path):
        raise FreqdoorError(f"{path}: expected a folder with {SIGNATURE}, or a file with its name and .sig beside it")
    names = digests(beside)
    try:
        from model_signing import verifying
    except ImportError:
        raise FreqdoorError(EXTRA) from None
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError, OSError) as error:
        raise FreqdoorError(f"{key}: expected a public key of an elliptic curve as a PEM file ({error})") from None
    reason = "the files are those that were signed with this key"
    signed = True
    try:
        config.verify(path, beside)
    except Exception as error:  # cryptography's and model-signing's own
        signed, reason = False, " ".join(str(error).split())[:400] or "it was signed with another key"
    return SignatureCheck(signature=str(beside), files=tuple(names), signed=signed, reason=reason)
