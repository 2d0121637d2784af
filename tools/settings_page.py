"""Write docs/settings.md: every setting with its values, default and meaning, from the settings themselves.

python tools/settings_page.py
"""

import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from freqdoor.attack.settings import OBJECTIVES, PlantSettings
from freqdoor.defence.settings import RepairSettings
from freqdoor.measure.testsets import FaceTest, SegmentationTest
from freqdoor.settings import Settings
from freqdoor.training.settings import CodecTraining
from freqdoor.triggers.arguments import TRIGGERS


def describe_settings(kind: type[Settings]) -> str:
    """Every setting with its values, default and meaning, as Markdown: a section for each table of the TOML file."""
    places: dict[type[Settings], list[str]] = {}  # tables of one kind, such as images and auxiliary, share a section
    for model, place in _places(kind):
        places.setdefault(model, []).append(place)
    return "\n".join(_section(model, names) for model, names in places.items())


def _places(model: type[Settings], title: str = "", path: str = "") -> Iterator[tuple[type[Settings], str]]:
    """A kind of settings and those in it, with the heading that a TOML file gives each, such as [[attacks]]."""
    yield model, title or model.__name__
    for name, field in model.model_fields.items():
        for table in _tables(field.annotation):
            below = f"{path}.{name}" if path else name
            several = get_origin(field.annotation) in (tuple, list)
            yield from _places(table, f"[[{below}]]" if several else f"[{below}]", below)


def _section(model: type[Settings], places: Sequence[str]) -> str:
    """One kind of settings under the headings by which a TOML file has it."""
    title = ", ".join(f"`{place}`" for place in places)
    rows = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        documented = (base.model_fields[name].description for base in _bases(model) if name in base.model_fields)
        meaning = next(filter(None, documented), None) or " ".join(t.__doc__ or "" for t in _tables(field.annotation))
        cells = (f"`{name}`", _bounded(_type(field.annotation), field.metadata), _default(field), meaning)
        rows.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return f"## {title}\n\n{' '.join((model.__doc__ or '').split())}\n\n" + "\n".join(rows) + "\n"


def _bases(model: type[Settings]) -> list[type[Settings]]:
    """A model and those that it is made from, which document what it only gives another default."""
    return [base for base in model.__mro__ if issubclass(base, Settings)]


def _tables(annotation: Any) -> Iterator[type[Settings]]:
    """The settings that a type holds, such as those of `tuple[AttackSettings, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for part in get_args(annotation):
        yield from _tables(part)


LIMITS = {  # pydantic's limits in words
    "gt": "> {:g}",
    "ge": ">= {:g}",
    "lt": "< {:g}",
    "le": "<= {:g}",
    "multiple_of": "a multiple of {}",
    "min_length": "at least {}",
}


def _bounded(words: str, metadata: Sequence[Any]) -> str:
    """A type's words with its limits, such as "number > 0"."""
    limits = [part for limit in metadata for part in (limit.metadata if isinstance(limit, FieldInfo) else [limit])]
    values = [(text, getattr(limit, key, None)) for limit in limits for key, text in LIMITS.items()]
    said = ", ".join(text.format(value) for text, value in values if value is not None)
    return f"{words} {said}".rstrip()


def _type(annotation: Any) -> str:
    """A type in words."""
    parts, origin = get_args(annotation), get_origin(annotation)
    if origin is Annotated:
        return _bounded(_type(parts[0]), parts[1:])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in parts if part is not types.NoneType)
    if origin in (tuple, list):
        each = [part for part in parts if part is not Ellipsis]
        return (
            f"{len(each)} of: {_type(each[0])}"
            if origin is tuple and len(each) == len(parts)
            else (f"list of: {_type(each[0])}")
        )
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, Settings)):
        return "table"
    return {int: "integer", float: "number", str: "text", bool: "true or false", Any: "any"}.get(annotation, "any")


def _default(field: FieldInfo) -> str:
    """A setting's default as TOML has it."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None:
        return "none"
    return "" if isinstance(default, Settings) or not (default or default in (0, "")) else f"`{json.dumps(default)}`"


PAGE = Path(__file__).parent.parent / "docs/settings.md"
KINDS = {
    "freqdoor plant": PlantSettings,
    "freqdoor train-codec": CodecTraining,
    "freqdoor repair": RepairSettings,
    "freqdoor segment": SegmentationTest,
    "freqdoor faces": FaceTest,
}


def page() -> str:
    """The whole page."""
    start = """# Every setting

Made by `python tools/settings_page.py` from the settings themselves. In a file they stand in the tables named here; on
the command line as `--set table.key=value`.
"""
    parts = (f"# {verb}\n\n{describe_settings(kind)}" for verb, kind in KINDS.items())
    arguments = [
        f"# {table}.arguments of {name}\n\n{describe_settings(kind.arguments)}"
        for table, kinds in (("objective", OBJECTIVES), ("trigger", TRIGGERS))
        for name, kind in kinds.items()
    ]
    return start + "\n" + "\n".join([*parts, *arguments])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
