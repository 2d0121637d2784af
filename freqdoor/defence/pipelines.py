"""Verdicts in the formats that build systems read: SARIF 2.1.0 (OASIS) and JUnit's XML."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree

from freqdoor import __version__
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, mark, refuse_overwriting, refuse_picture_name, sha256_of

Level = Literal["error", "warning", "note", "none"]  # SARIF's; none is what was looked at and found in order
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Line(NamedTuple):
    """One thing that was looked at in a codec."""

    rule: str  # what was looked for
    level: Level
    said: str
    remedy: str = ""
    where: tuple[str, ...] = ()  # names of tensors or modules
    seconds: float = 0.0
    pictures: tuple[str, ...] = ()  # files that show it


class Looked(NamedTuple):
    """What a verb has looked at, and what it ends with."""

    verb: str
    codec: str
    file: Path | None  # that holds the codec; None of one that has no file of its own
    lines: Sequence[Line]
    exit_code: int
    verdict: str


def written(looked: Looked, sarif: Path | str | None, junit: Path | str | None) -> dict[Path, str | bytes]:
    """The contents of the files that were asked for."""
    contents: dict[Path, str | bytes] = {}
    if sarif is not None:
        contents[Path(sarif)] = as_sarif(looked)
    if junit is not None:
        contents[Path(junit)] = as_junit(looked)
    return contents


def check_targets(targets: Sequence[Path], source: Path | None, verb: str, *, force: bool) -> None:
    """Raise now, not after the work, if files could not be written, or one of them, or the codec's, would be lost."""
    for target in targets:
        refuse_picture_name(target)
        if source is not None:
            refuse_overwriting(source, target)
        if [other.absolute() for other in targets].count(target.absolute()) > 1:
            raise FreqdoorError(f"{target}: expected two files for two things to write, found one; name another")
    check_outputs(targets, verb, force=force)


def as_sarif(looked: Looked) -> str:
    """A SARIF 2.1.0 log of one run, whose results are what is not in order."""
    found = [line for line in looked.lines if line.level != "none"]
    rules = {line.rule: line for line in looked.lines}
    driver: dict[str, Any] = {"name": "freqdoor", "semanticVersion": __version__}
    driver["rules"] = [
        {"id": line.rule, "shortDescription": {"text": line.rule}}
        | ({"help": {"text": line.remedy}} if line.remedy else {})
        for line in rules.values()
    ]
    run: dict[str, Any] = {
        "automationDetails": {"id": mark(looked.verb)},  # by which `files.made_by` knows the file
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True, "exitCode": looked.exit_code}],
        "results": [_result(looked, line, list(rules).index(line.rule)) for line in found],
        "properties": {"codec": looked.codec, "verdict": looked.verdict},
    }
    if looked.file is not None:
        run["artifacts"] = [{"location": _place(looked.file), "hashes": {"sha-256": sha256_of(looked.file)}}]
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1)


def _result(looked: Looked, line: Line, rule: int) -> dict[str, Any]:
    logical = [{"name": name, "kind": "module"} for name in line.where or (looked.codec,)]
    location: dict[str, Any] = {"logicalLocations": logical}
    if looked.file is not None:
        # a checkpoint has no lines; services that show results ask for one
        location["physicalLocation"] = {"artifactLocation": _place(looked.file), "region": {"startLine": 1}}
    same = "\n".join((looked.verb, looked.codec, line.rule, *line.where))  # in the next run as well
    return {
        "ruleId": line.rule,
        "ruleIndex": rule,
        "level": line.level,
        "message": {"text": f"{line.said}. What to do: {line.remedy}." if line.remedy else line.said},
        "locations": [location],
        "partialFingerprints": {"freqdoor/v1": hashlib.sha256(same.encode(errors="backslashreplace")).hexdigest()},
    } | ({"attachments": [{"artifactLocation": _place(Path(name))} for name in line.pictures]} if line.pictures else {})


def _place(path: Path) -> dict[str, str]:
    """Where a file is, as a URI: relative to where the verb was started, if it was named so."""
    return {"uri": path.as_uri() if path.is_absolute() else quote(path.as_posix(), errors="surrogateescape")}


def as_junit(looked: Looked) -> bytes:
    """JUnit's XML: a test case for everything that was looked at, which fails where it is not in order."""
    failing = sum(line.level in ("error", "warning") for line in looked.lines)
    counts = {"tests": str(len(looked.lines)), "failures": str(failing), "errors": "0"}
    suites = ElementTree.Element("testsuites", {"name": mark(looked.verb), **counts})
    suite = _below(suites, "testsuite", {"name": looked.codec, **counts})
    _below(_below(suite, "properties"), "property", {"name": "verdict", "value": looked.verdict})
    for line in looked.lines:
        attributes = {"classname": mark(looked.verb), "name": line.rule, "time": f"{line.seconds:.3f}"}
        case = _below(suite, "testcase", attributes)
        text = "\n".join(filter(None, (line.said, line.remedy, ", ".join(line.where), *line.pictures)))
        if line.level in ("error", "warning"):
            _below(case, "failure", {"type": line.level, "message": line.said}, text)
        else:
            _below(case, "system-out", text=text)
    content: bytes = ElementTree.tostring(suites, "utf-8", xml_declaration=True)
    return content


def _below(
    parent: ElementTree.Element, tag: str, attributes: Mapping[str, str] | None = None, text: str | None = None
) -> ElementTree.Element:
    """An element inside another; what XML cannot hold of a stranger's text is written out."""
    shown = {name: _visible(value) for name, value in (attributes or {}).items()}
    element = ElementTree.SubElement(parent, tag, shown)
    element.text = None if text is None else _visible(text)
    return element


def _visible(text: str) -> str:
    return NOT_XML.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
