"""A codec and the verdict on it as a bill of materials: CycloneDX 1.6 (ECMA-424), with a model card."""

import json
import uuid
from collections.abc import Mapping
from typing import Any

from freqdoor import __version__
from freqdoor.defence.pipelines import Looked
from freqdoor.files import mark, sha256_of

MALICIOUS_CODE = 506  # CWE: embedded malicious code
PICTURE = "picture, 8-bit RGB"


def as_bom(looked: Looked, architecture: str, reason: str, modules: Mapping[str, str]) -> str:
    """The bill of materials of one codec: SHA-256 of its file and modules, and a vulnerability if it is tampered with.

    Args:
        reason: of the verdict.
        modules: SHA-256 of each.
    """
    digest = None if looked.file is None else sha256_of(looked.file)
    reference = f"codec:{digest or looked.codec}"
    facts = {
        "verdict": looked.verdict,
        "reason": reason,
        **{f"sha256:{name}": value for name, value in modules.items()},
    }
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": looked.codec,
        "description": "Learned image codec",
        "modelCard": {
            "modelParameters": {
                "task": "image compression",
                "architectureFamily": "learned image codec",
                "modelArchitecture": architecture,
                "inputs": [{"format": PICTURE}],
                "outputs": [{"format": PICTURE}],
            }
        },
        "properties": [{"name": f"freqdoor:{key}", "value": value} for key, value in facts.items()],
    }
    if digest is not None:
        component["hashes"] = [{"alg": "SHA-256", "content": digest}]
    bom: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "metadata": {
            "properties": [{"name": "made_by", "value": mark(looked.verb)}],  # by which `files.made_by` knows the file
            "tools": {"components": [{"type": "application", "name": "freqdoor", "version": __version__}]},
        },
        "components": [component],
    }
    if looked.verdict == "tampered":
        bom["vulnerabilities"] = [
            {
                "id": "freqdoor:backdoor",
                "description": f"A backdoor in the encoder: {reason}",
                "cwes": [MALICIOUS_CODE],
                "ratings": [{"severity": "critical", "method": "other"}],
                "analysis": {"state": "exploitable"},
                "affects": [{"ref": reference}],
            }
        ]
    content = json.dumps(bom, sort_keys=True)
    bom["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}"  # the same for the same finding
    return json.dumps(bom, indent=1)
