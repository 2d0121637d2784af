"""Write freqdoor/schemas: a JSON schema of what each verb answers with --json, from the types that it answers with.

    python tools/schemas.py

A test says when they are not those of the types any more.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from freqdoor.cli.terminal import Failure
from freqdoor.codecs.signed import SignatureCheck
from freqdoor.defence.audit import Audit
from freqdoor.defence.calibration import Calibration
from freqdoor.defence.doctor import Diagnosis
from freqdoor.defence.encoding import Compressed
from freqdoor.defence.expectation import GuardCalibration
from freqdoor.defence.fleet import Manifest
from freqdoor.defence.repair import Repair
from freqdoor.files import mark
from freqdoor.listing import Listing
from freqdoor.measure.analysis import Analysis
from freqdoor.measure.faces import IdentityScores, Protection
from freqdoor.measure.pgd import Comparisons
from freqdoor.measure.report import Summary
from freqdoor.measure.segmentation import SegmentationScores
from freqdoor.measure.watermark import Ownership
from freqdoor.paper.tables import Reproduced
from freqdoor.types import Written

FOLDER = Path(__file__).parent.parent / "freqdoor" / "schemas"
ANSWERS: dict[str, Any] = {
    "analyse": Analysis,
    "audit": Audit,
    "calibrate-audit": Calibration,
    "calibrate-guard": GuardCalibration,
    "compress": Compressed,
    "decompress": Written,
    "demo": Summary,
    "doctor": Diagnosis,
    "export": Written,
    "evaluate": Summary,
    "faces": IdentityScores,
    "fleet": Manifest,
    "list": Listing,
    "pgd": Comparisons,
    "plant": Written,
    "poison": Written,
    "protect": Protection,
    "repair": Repair,
    "report": Summary,
    "reproduce": Reproduced,
    "segment": SegmentationScores,
    "train-codec": Written,
    "verify-owner": Ownership,
    "verify-signature": SignatureCheck,
}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _AsPrinted(GenerateJsonSchema):
    """Numbers as they are printed: null where they are not finite."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        """A number or null."""
        return {"anyOf": [super().float_schema(schema), {"type": "null"}]}


def schema_of(verb: str, kind: Any) -> dict[str, Any]:
    """The schema of a verb's answer; it names the verb, as the answer does."""
    schema = TypeAdapter(kind).json_schema(mode="serialization", schema_generator=_AsPrinted)
    title = f"freqdoor {verb} --json"
    schema |= {
        "$schema": DIALECT,
        "title": title,
        "properties": {"made_by": {"const": mark(verb)}, **schema["properties"]},
        "required": ["made_by", *schema.get("required", [])],
    }
    return schema


def error_schema() -> dict[str, Any]:
    """The schema of what any verb answers that could not do its work."""
    schema = TypeAdapter(Failure).json_schema(mode="serialization")
    properties = {"made_by": {"type": "string", "pattern": f"^{mark('')}"}, **schema["properties"]}
    required = ["made_by", *schema["required"]]
    return schema | {"$schema": DIALECT, "title": "freqdoor: no answer", "properties": properties, "required": required}


def schemas() -> dict[str, str]:
    """The files' contents by their names."""
    found = {verb: schema_of(verb, kind) for verb, kind in ANSWERS.items()} | {"error": error_schema()}
    return {f"{name}.json": json.dumps(schema, indent=1) + "\n" for name, schema in found.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (FOLDER / name).write_text(text)
