"""What attacks are measured on: the contract of a measurement, and the settings of those on downstream networks."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Self, TypeVar

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import to_json

from freqdoor.errors import FreqdoorError
from freqdoor.files import name_and_file
from freqdoor.limits import LONGEST_TEXT, parse_json, read_whole
from freqdoor.settings import PrivatePath, Settings, file_name, load_settings, public
from freqdoor.training.settings import Count

if TYPE_CHECKING:  # the command line reads these settings without loading PyTorch
    from freqdoor.attack.planted import Planted
    from freqdoor.attack.settings import AttackSettings
    from freqdoor.measure.journal import Journal

SCHEMA = 2  # of a file of scores; those of version 1 name no schema, and may hold NaN
S = TypeVar("S")


class SegmentationTest(Settings):
    """`freqdoor segment`: what a segmentation attack (Eq. (11)) is measured on."""

    images: PrivatePath
    """Folder of 8-bit RGB images."""
    labels: PrivatePath | None = None
    """Folder of label images of the same names, for mean IoU; by default none is measured."""
    resize: tuple[Count, Count] | None = None
    """Resize images to (height, width), as the attack was trained."""
    every: Count = 1
    """Take every n-th image only."""
    networks: Annotated[tuple[PrivatePath, ...], Field(min_length=1)]
    """What is to be misled, each as for `load_network`; give one that the attack has not seen."""
    mask_network: PrivatePath | None = None
    """What says where the source class is when the trigger is added; by default the first network."""


class FaceTest(Settings):
    """`freqdoor faces`: what the removal of identities (Eq. (13)) is measured on."""

    folder: PrivatePath
    """Folder that the lists' paths are relative to."""
    gallery: PrivatePath | None = None
    """List of images of known persons, one path a line; a picture's folder is the person."""
    probes: PrivatePath | None = None
    """List of other images of the same persons, to be identified."""
    identities: PrivatePath | None = None
    """Who is on which picture, "PATH PERSON" a line, as CelebA's identity_CelebA.txt; by default its folder says so."""
    sample: Count | None = None
    """Draw so many persons of `identities` instead of reading lists: two pictures of each for the gallery, a third one
    as probe, and with it two pairs, one of the same person and one of two persons."""
    pairs: PrivatePath | None = None
    """List of pairs for verification, "PATH PATH LABEL" a line, 1 for the same person; by default none."""
    every: Count = 1
    """Take every n-th line of each list only."""
    networks: Annotated[tuple[PrivatePath, ...], Field(min_length=1)]
    """Face embeddings, each as for `load_network`; give one that the attack has not seen."""

    @model_validator(mode="after")
    def _persons_are_known(self) -> Self:
        lists = (self.gallery, self.probes, self.pairs)
        if self.sample and (not self.identities or any(lists)):
            raise ValueError("sample: expected identities and no lists beside it, from which persons are drawn")
        if not self.sample and not (self.gallery and self.probes):
            raise ValueError("gallery, probes: expected both lists, or identities and sample, to draw them")
        return self


class DownstreamTest(Settings):
    """What `freqdoor reproduce` measures downstream attacks on; a recipe takes the table that it needs."""

    segmentation: SegmentationTest | None = None
    faces: FaceTest | None = None


class Measurement(ABC, Generic[S]):
    """What an attack is measured by, whether images or networks that see them; S is the type of its scores.

    Two of equal content are equal and have one hash: what they measure is measured once.
    """

    kind: ClassVar[Any]
    """S, for reading scores that were kept."""

    @abstractmethod
    def check(self, attacks: "Sequence[AttackSettings]") -> None:
        """Raise a FreqdoorError for everything that would fail after hours of planting.

        Args:
            attacks: those that are to be measured.
        """

    @abstractmethod
    def score(self, planted: "Planted", trigger: str | None) -> S:
        """The scores of one trigger of an encoder, or of the encoder without any."""

    def score_on(self, planted: "Planted", trigger: str | None, journal: "Journal") -> S:
        """As `score`, but going on from what an earlier process has measured, if this measurement keeps that."""
        return self.score(planted, trigger)

    @abstractmethod
    def identity(self) -> str:
        """All that the scores depend on besides the encoder, contents of files included."""

    def describe(self, trained_against: str) -> str:
        """A paragraph on what was measured on, for a table's page; empty where the page says it by itself.

        Args:
            trained_against: file names of the network of the table's attacks, or nothing.
        """
        return ""

    def public(self) -> dict[str, Any] | None:
        """Its settings as they may travel in a file; None where the page says them by itself."""
        return None

    def dumps(self, scores: S) -> str:
        """Scores as JSON, to be kept."""
        return TypeAdapter(self.kind).dump_json(scores).decode()

    def loads(self, text: str) -> S | None:
        """Scores that were kept; None if the text is damaged, so that they are measured anew."""
        try:
            scores: S = TypeAdapter(self.kind).validate_json(text)
        except ValidationError:
            return None
        return scores


class DownstreamMeasurement(Measurement[S]):
    """A measurement whose networks and pictures are named by settings."""

    test: "SegmentationTest | FaceTest"
    trained: ClassVar[str] = ""
    """What there is to add to what its attacks are trained against."""

    @property
    @abstractmethod
    def pictures(self) -> str:
        """What the page calls the pictures by: a folder or a list."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Files whose content the scores depend on besides the networks."""

    def identity(self) -> str:
        """The settings, and a hash of the pictures, lists, specs and networks."""
        from freqdoor.attack.networks import NetworkSpec
        from freqdoor.data import dataset_hash

        names = [*self.test.networks, *filter(None, [getattr(self.test, "mask_network", None)])]
        paths = self.files()
        for name in names:
            spec, source = name_and_file(name)
            file = source or load_settings(NetworkSpec, spec).file
            paths += [Path(spec), Path(source) if source else Path(spec).parent / str(file)]
        return json.dumps([self.test.model_dump_json(), dataset_hash([path for path in paths if path.is_file()])])

    def describe(self, trained_against: str) -> str:
        """The networks, what the attacks are trained against, and the pictures."""
        networks = ", ".join(map(file_name, self.test.networks))
        every = f", 1 in {self.test.every}" if self.test.every > 1 else ""
        return f"""
Downstream networks, from the first to the last: {networks}. Attacks are trained against
{trained_against or "the networks that they name"}{self.trained}, and measured on “{Path(self.pictures).name}”{every}.
"""

    def public(self) -> dict[str, Any]:
        """The settings, with files' names only."""
        return public(self.test)


def mean(values: Sequence[float]) -> float | None:
    """The mean; None over nothing, and where it is not finite."""
    total = sum(values) / len(values) if values else math.nan
    return total if math.isfinite(total) else None


def number(value: float | None, digits: int, *, scale: float = 1.0) -> str:
    """A value of a table, "-" for what was not measured."""
    return "-" if value is None else f"{scale * value:.{digits}f}"


def results_text(scores: Any, environment: Any) -> str:
    """A file of scores: a dataclass's fields, the schema's version and the environment; null instead of NaN."""
    fields = TypeAdapter(type(scores)).dump_python(scores)
    return to_json({"schema": SCHEMA, **fields, "environment": environment}, indent=1, inf_nan_mode="null").decode()


def read_results(kind: type[S], path: Path | str) -> S:
    """The scores of a file that `results_text` or an earlier version made, whose NaN becomes None.

    Raises:
        FreqdoorError: no such file, another kind of file, or a schema that is newer than this version.
    """
    try:
        text = read_whole(path, "scores", LONGEST_TEXT)
        content = parse_json(text, path, LONGEST_TEXT, expected="scores as JSON", nan_as_null=True)
        if not isinstance(content, dict):
            raise ValueError(f"expected a table, found {type(content).__name__}")
        if (schema := content.get("schema", 1)) not in range(1, SCHEMA + 1):
            raise FreqdoorError(f"{path}: schema {schema!r} is not one of 1 to {SCHEMA}; read it with a newer version")
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        places = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors()[:3])
        raise FreqdoorError(f"{path}: expected {kind.__name__}, found something else (see {places})") from None
    except ValueError as error:
        raise FreqdoorError(f"{path}: expected scores as JSON, found something else ({str(error)[:80]})") from None
