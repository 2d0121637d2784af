"""What the verbs answer with --json: a type each, where the function of the verb's name returns none of its own."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from freqdoor.codecs.signed import SignatureCheck
from freqdoor.defence.audit import Audit
from freqdoor.defence.calibration import Calibration
from freqdoor.defence.doctor import Diagnosis
from freqdoor.defence.expectation import GuardCalibration
from freqdoor.defence.fleet import Manifest
from freqdoor.defence.guard import Guarded, Outcome
from freqdoor.defence.repair import Repair
from freqdoor.listing import Listing
from freqdoor.measure.analysis import Analysis
from freqdoor.measure.faces import IdentityScores, Protected
from freqdoor.measure.pgd import Comparison
from freqdoor.measure.report import Summary
from freqdoor.measure.segmentation import SegmentationScores
from freqdoor.measure.watermark import Answer
from freqdoor.paper.tables import Cell
from freqdoor.types import Bitstream, Result


class Written(Result):
    """Files that were written, in the order of what they were made of."""

    files: tuple[str, ...]

    @classmethod
    def of(cls, paths: Iterable[Path | str]) -> Self:
        """Those of some paths that are there: on all machines but the first a training writes none."""
        return cls(files=tuple(str(path) for path in paths if os.path.exists(path)))


class Compressed(Result):
    """A file that holds one image."""

    file: str
    bytes: int  # of the file
    payload_bytes: int  # what bpp counts: without header and checksum
    bpp: float
    width: int
    height: int
    guard: Outcome | None  # what a guard decided; None without one

    @classmethod
    def of(cls, result: Bitstream | Guarded, file: Path) -> Self:
        """What `compress` has returned and written."""
        sent = result.sent if isinstance(result, Guarded) else result
        height, width = sent.image_size
        return cls(
            file=str(file),
            bytes=file.stat().st_size,
            payload_bytes=sent.num_bytes,
            bpp=8 * sent.num_bytes / (height * width),
            width=width,
            height=height,
            guard=result.outcome if isinstance(result, Guarded) else None,
        )


class FalsePositives(Result):
    """How many of others' encoders pass for the owner's."""

    passing: int
    encoders: int
    upper: float  # end of the exact 95 % interval of their share


class Ownership(Result):
    """What encoders answer to the owner's trigger, by the names that they were given by."""

    answers: dict[str, Answer]
    false_positives: FalsePositives | None  # where all are known to be others'


class Comparisons(Result):
    """A trigger beside attacks that are made for every image."""

    rows: tuple[Comparison, ...]


class Protection(Result):
    """Photos, and what became of each."""

    photos: tuple[Protected, ...]


class Reproduced(Result):
    """A recipe's table: rows, and in each its columns; a row that is not planted yet has none."""

    recipe: str
    page: str  # the file
    rows: dict[str, dict[str, Cell]]


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
