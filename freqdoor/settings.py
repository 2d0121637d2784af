"""Settings as files: TOML with dotted overrides, typed by pydantic; every mistake in a file is reported at once."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from freqdoor.errors import FreqdoorError


class Settings(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


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
        lines = mistakes(error)
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
