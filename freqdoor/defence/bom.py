"""A codec and the verdict on it as a bill of materials: CycloneDX 1.6 (ECMA-424), with a model card."""

import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqdoor import __version__
from freqdoor.defence.pipelines import sha256_of
from freqdoor.files import mark

if TYPE_CHECKING:
    from freqdoor.defence.audit import Audit

MALICIOUS_CODE = 506  # CWE: embedded malicious code
PICTURE = "picture, 8-bit RGB"


def as_bom(audit: "Audit", name: str, file: Path | None) -> str:
    """The bill of materials of one codec: SHA-256 of its file and modules, and a vulnerability if it is tampered with.

    Args:
        name: what the codec was given as.
        file: that holds it, if there is one.
    """
    digest = None if file is None else sha256_of(file)
    reference = f"codec:{digest or audit.codec}"
    facts = {"verdict": audit.verdict, "reason": audit.reason, "p_value": audit.p_value}
    facts |= {f"sha256:{module}": value for module, value in audit.modules.items()}
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": name,
        "description": "Learned image codec",
        "modelCard": {
            "modelParameters": {
                "task": "image compression",
                "architectureFamily": "learned image codec",
                "modelArchitecture": audit.architecture,
                "inputs": [{"format": PICTURE}],
                "outputs": [{"format": PICTURE}],
            }
        },
        "properties": [
            {"name": f"freqdoor:{key}", "value": str(value)} for key, value in facts.items() if value is not None
        ],
    }
    if digest is not None:
        component["hashes"] = [{"alg": "SHA-256", "content": digest}]
    bom: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "metadata": {
            "properties": [{"name": "made_by", "value": mark("audit")}],  # by which `files.made_by` knows the file
            "tools": {"components": [{"type": "application", "name": "freqdoor", "version": __version__}]},
        },
        "components": [component],
    }
    if audit.verdict == "tampered":
        bom["vulnerabilities"] = [
            {
                "id": "freqdoor:backdoor",
                "description": f"A backdoor in the encoder: {audit.reason}",
                "cwes": [MALICIOUS_CODE],
                "ratings": [{"severity": "critical", "method": "other"}],
                "analysis": {"state": "exploitable"},
                "affects": [{"ref": reference}],
            }
        ]
    content = json.dumps(bom, sort_keys=True)
    bom["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}"  # the same for the same finding
    return json.dumps(bom, indent=1)
