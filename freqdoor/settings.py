"""Settings as files: TOML with dotted overrides, typed by pydantic; every mistake in a file is reported at once."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, PlainSerializer, SerializationInfo, ValidationError

from freqdoor.errors import FreqdoorError


class Settings(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def file_name(text: str) -> str:
    """Of a path the last part, of "FOLDER/SPEC.toml=FOLDER/FILE" both last parts; names without folders stay."""
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


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `top`, table by table."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


S = TypeVar("S", bound=Settings)


def parse_override(text: str) -> tuple[list[str], Any]:
    """("a.b", value) of "a.b=value"; the value is TOML, or a plain string where it is not."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise FreqdoorError(f"--set {text}: expected key=value, for example trigger.eps=0.003")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    return key.strip().split("."), parsed


def load_settings(kind: type[S], path: Path | str | None = None, overrides: Sequence[str] = ()) -> S:
    """Settings from a TOML file and "dotted.key=value" overrides; raises with every mistake, one a line."""
    source = str(path) if path else "settings"
    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise FreqdoorError(f"{path}: could not read the config ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FreqdoorError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        keys, value = parse_override(override)
        table = content
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise FreqdoorError(f"--set {override}: {key} is a value, not a table")
        table[keys[-1]] = value
    return make_settings(kind, content, source)


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
