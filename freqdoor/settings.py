"""Settings as files: TOML with dotted overrides, typed by pydantic; every mistake in a file is reported at once."""

import json
import tomllib
import types
from collections.abc import Iterator, Sequence
from datetime import date, time
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from freqdoor.errors import FreqdoorError
from freqdoor.files import read_text


class Settings(BaseModel):
    """Frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `top`, table by table."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


S = TypeVar("S", bound=Settings)


def parse_override(text: str) -> tuple[list[str], Any]:
    """("a.b", value) of "a.b=value"; the value is TOML, or a plain string where it is not or is a date."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise FreqdoorError(f"--set {text}: expected key=value, for example trigger.eps=0.003")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        parsed = value
    is_date = isinstance(parsed, date | time)  # no setting is one, and a folder may be called like one
    return key.split("."), value if is_date else _dates_as_text(parsed)


def _dates_as_text(value: Any) -> Any:
    """The dates in a TOML value as text: they are names."""
    if isinstance(value, dict):
        return {key: _dates_as_text(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_dates_as_text(part) for part in value]
    return value.isoformat() if isinstance(value, date | time) else value


def load_settings(kind: type[S], path: Path | str | None = None, overrides: Sequence[str] = ()) -> S:
    """Settings from a TOML file and "dotted.key=value" overrides; raises with every mistake, one a line.

    A setting that is a text takes an override's value as it was typed, so that a folder may be called 1e3 or true.
    """
    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = _dates_as_text(tomllib.loads(read_text(path, "the config")))
        except tomllib.TOMLDecodeError as error:
            raise FreqdoorError(f"{path}: not valid TOML: {error}") from None
        except RecursionError:
            raise FreqdoorError(f"{path}: not valid TOML: its tables are nested too deeply") from None
    texts: dict[tuple[str, ...], str] = {}
    for override in overrides:
        keys, value = parse_override(override)
        _set(content, keys, value, override)
        if not isinstance(value, dict | list):
            texts[tuple(keys)] = override.partition("=")[2].strip()
    for place in _places_of_text(kind, content):
        for keys_of_text, text in texts.items():
            if place[: len(keys_of_text)] == keys_of_text:  # a place inside a union goes on with the type's name
                _set(content, list(keys_of_text), text, text)
    return make_settings(kind, content, str(path) if path else "settings")


def _places_of_text(kind: type[Settings], content: dict[str, Any]) -> list[tuple[int | str, ...]]:
    """Where a text is expected and a number, or true or false, was found."""
    try:
        kind.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        return [p["loc"] for p in problems if p["type"] == "string_type" and isinstance(p["input"], int | float)]
    return []


def _set(content: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    """Put an override's value where its dotted key says."""
    table = content
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise FreqdoorError(f"--set {override}: {key} is a value, not a table")
    table[keys[-1]] = value


def make_settings(kind: type[S], content: dict[str, Any], source: str = "settings") -> S:
    """Validated settings; raises with every mistake, one a line."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            place = ".".join(str(part) for part in problem["loc"]) or "as a whole"
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = "unknown setting"
            elif problem["type"] != "missing":
                message += f", found {problem['input']!r}" if not isinstance(problem["input"], dict) else ""
            lines.append(f"{place}: {message}")
        raise FreqdoorError(f"{source}: {len(lines)} mistake(s):\n  " + "\n  ".join(lines)) from None


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
