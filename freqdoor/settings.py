"""Settings as files: TOML with dotted overrides, typed by pydantic; every mistake in a file is reported at once."""

import re
import tomllib
from collections.abc import Sequence
from datetime import date, time
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, PlainSerializer, SerializationInfo, ValidationError

from freqdoor.errors import FreqdoorError, Mistakes
from freqdoor.files import read_text
from freqdoor.limits import DEEPEST
from freqdoor.lock import check_folder

LONGEST = 2**18  # characters of a file of settings
CHAIN = re.compile(rf"(?:[\w-]+[ \t]*\.[ \t]*){{{DEEPEST}}}")  # a key with so many points takes minutes to read


class Settings(BaseModel):
    """Frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def beside(cls, content: dict[str, Any]) -> list[str]:
        """What else would be wrong on this machine with a content that has mistakes: all are told in one round."""
        return []


class Arguments(Settings):
    """Settings that Python code gives as well as a file: no text passes for a number, and no mistake as a traceback.

    Raises:
        FreqdoorError: every mistake, and the names that there are where one is unknown.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            unknown = any(problem["type"] == "extra_forbidden" for problem in error.errors())
            known = f" (there are {', '.join(type(self).model_fields)})" if unknown else ""
            reasons = (line.removeprefix("as a whole: ") for line in mistakes(error))
            raise FreqdoorError("; ".join(reasons) + known) from None


def file_name(text: str) -> str:
    """Of a path the last part, of "FOLDER/SPEC.toml=FOLDER/FILE" both last parts; names without folders stay.

    Several, apart by semicolons, are shortened one by one.
    """
    if ";" in text:
        return ";".join(file_name(part.strip()) for part in text.split(";"))
    spec, cut, file = text.rpartition(".toml=")
    last = re.split(r"[/\\]", file.rstrip("/\\"))[-1]
    return f"{file_name(spec + '.toml')}={last}" if cut else last


def is_public(info: SerializationInfo) -> bool:
    """Whether what is dumped is to travel in a file (`public`), instead of staying on this machine."""
    return "public" in (info.context or {})


def _as_it_may_travel(value: Any, info: SerializationInfo) -> Any:
    return file_name(value) if isinstance(value, str) and is_public(info) else value


PrivatePath = Annotated[str, PlainSerializer(_as_it_may_travel)]
"""A file, a folder, or SPEC.toml=FILE: where it lies on this machine stays here, only its name travels in files."""


def public(settings: BaseModel) -> dict[str, Any]:
    """The settings as they may travel in a file: of folders and files the name only, not where they lie."""
    return settings.model_dump(context={"public": True})


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys as --set takes them."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


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


def load_settings(
    kind: type[S], path: Path | str | None = None, overrides: Sequence[str] = (), *, out: Path | str | None = None
) -> S:
    """Settings from a TOML file and "dotted.key=value" overrides; raises with every mistake, one a line.

    A setting that is a text takes an override's value as it was typed, so that a folder may be called 1e3 or true.

    Args:
        out: the folder that is to be written into, of a verb that begins: mistakes are told with those of `beside`
            and of this folder.
    """
    content: dict[str, Any] = {}
    if path is not None:
        try:
            text = read_text(path, "the config")
            if len(text) > LONGEST or CHAIN.search(text):
                raise FreqdoorError(
                    f"{path}: expected settings of at most {LONGEST} characters, with tables nested at most {DEEPEST} "
                    "deep, found more"
                )
            content = _dates_as_text(tomllib.loads(text))
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
    return make_settings(kind, content, str(path) if path else "settings", out=out)


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


def make_settings(
    kind: type[S], content: dict[str, Any], source: str = "settings", *, out: Path | str | None = None
) -> S:
    """Validated settings; raises with every mistake, one a line, and with `out`, what is wrong on this machine."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = mistakes(error)
        if out is not None:
            lines += kind.beside(content)
            others = Mistakes()
            with others:
                check_folder(out)
            lines += others.found
        raise FreqdoorError(f"{source}: {len(lines)} mistake(s):\n  " + "\n  ".join(lines)) from None


def mistakes(error: ValidationError, names: Sequence[str] = ()) -> list[str]:
    """Every mistake that a validation has met, as "place: what is wrong, found ...".

    Args:
        names: what arguments that were given by position are called.
    """
    lines = []
    for problem in error.errors(include_url=False):
        places = [names[part] if isinstance(part, int) and part < len(names) else str(part) for part in problem["loc"]]
        if problem["type"] == "unexpected_positional_argument":
            places = [f"argument {int(problem['loc'][0]) + 1}"]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown setting"
        elif problem["type"] != "missing":
            message += f", found {problem['input']!r}" if not isinstance(problem["input"], dict) else ""
        lines.append(f"{'.'.join(places) or 'as a whole'}: {message}")
    return lines
