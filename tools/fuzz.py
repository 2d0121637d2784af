"""What strangers could send, sent: damaged and hostile files of every kind to the command line, in forked children.

python tools/fuzz.py --cases 20000 --jobs 2 --json fuzz.json --page     # all kinds, the long run of docs/security.md
python tools/fuzz.py --short                                            # a minute
python tools/fuzz.py --kind bitstreams --start 512 --cases 1            # one case again
python tools/fuzz.py --guided container --seconds 600                   # guided by coverage, where atheris is installed

Case n of a kind is always the same. A finding is kept under --keep with its files and the command that repeats it.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from hostile import KINDS, Case, Material, make_material
from PIL import Image
from running import Command, Ended, counted, decoys, ended, load_everything, own_megabytes, report, start, write

SHORT = {  # cases of each kind: a minute on two cores
    "pictures": 160,
    "bitstreams": 200,
    "codecs": 160,
    "planted": 120,
    "configs": 80,
    "lists": 40,
    "networks": 60,
    "results": 60,
}
SHARES = {  # of a long run
    "pictures": 0.2,
    "bitstreams": 0.25,
    "codecs": 0.2,
    "planted": 0.1,
    "configs": 0.07,
    "lists": 0.03,
    "networks": 0.07,
    "results": 0.08,
}


BATCH = 16  # cases of one child: forking takes as long as running one


class Drawn(NamedTuple):
    """A case with its files."""

    kind: str
    number: int
    case: Case
    folder: Path

    @property
    def command(self) -> Command:
        return Command(self.case.words, self.folder)


def judged(case: Case, done: Ended, folder: Path) -> str:
    """What is wrong with how a case ended; empty if nothing is."""
    if done.fault:
        return done.fault
    work = folder / "work"
    left = [path for place in (work, folder / "tmp") for path in place.rglob("*")]
    if (work / "ran").exists():
        return "code of a file ran"
    if any(path.name.startswith(".partial-") or path.parent == folder / "tmp" for path in left):
        return "temporary files left"
    if done.code != 0:
        written = [path for path in left if path.is_file() and path.name.startswith("out")]
        return "half-written file" if written else ""
    if case.same and not same_picture(work / "out.png", case.same):
        return "wrong picture"
    return ""


def same_picture(found: Path, expected: Path) -> bool:
    with Image.open(found) as one, Image.open(expected) as other:
        return one.size == other.size and one.tobytes() == other.tobytes()


def cases(kinds: dict[str, int], start_at: int, seconds: float | None) -> Iterator[tuple[str, int]]:
    """The kinds in turn, so that a run that is stopped has seen all of them."""
    until = time.monotonic() + seconds if seconds else None
    left = dict(kinds)
    number = start_at
    while left and (until is None or time.monotonic() < until):
        for kind in list(left):
            yield kind, number
            left[kind] -= 1
            if not left[kind]:
                del left[kind]
        number += 1


def fuzz(material: Material, kinds: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Run the cases, `--jobs` children at once; what was found by kind."""
    tally = Tally({kind: Counter() for kind in kinds}, Counter(), Counter(), [])
    running: dict[int, list[Drawn]] = {}
    waiting: list[list[Drawn]] = []  # what a child that died has left
    upcoming = cases(kinds, options.start, options.seconds)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place, decoys(Path(place) / "programs"):
        while True:
            while len(running) < options.jobs:
                batch = waiting.pop() if waiting else [draw(*c, material, Path(place)) for c in islice(upcoming, BATCH)]
                if not batch:
                    break
                running[start([drawn.command for drawn in batch])] = batch
            if not running:
                break
            pid, status = os.wait()
            batch = running.pop(pid)
            for place_in_batch, drawn in enumerate(batch):
                done = ended(drawn.command, status)
                if done is None:
                    break
                note(tally, drawn, done, options.keep, alone=place_in_batch == 0)
            else:
                continue
            if place_in_batch == 0:
                raise RuntimeError(f"a child ended before it began: status {status}")
            waiting.append(batch[place_in_batch:])
    seconds = time.monotonic() - began
    total = sum(sum(counts.values()) for counts in tally.outcomes.values())
    return {
        "cases": total,
        "seconds": round(seconds),
        "cases per second": round(total / seconds, 1),
        "outcomes": {kind: dict(counts) for kind, counts in tally.outcomes.items()},
        "largest memory, MiB": dict(tally.memory),
        "slowest, ms": dict(tally.slowest),
        "findings": tally.findings,
    }


class Tally(NamedTuple):
    """What was found so far, by kind."""

    outcomes: dict[str, Counter[str]]
    memory: Counter[str]
    slowest: Counter[str]
    findings: list[dict[str, Any]]


def draw(kind: str, number: int, material: Material, place: Path) -> Drawn:
    """A case and its files."""
    folder = place / f"{kind}-{number}"
    folder.mkdir()
    return Drawn(kind, number, KINDS[kind](Random(f"{kind} {number}"), material, folder), folder)


def note(tally: Tally, drawn: Drawn, done: Ended, place: Path, *, alone: bool) -> None:
    """Count how a case ended, and keep what is wrong."""
    fault = judged(drawn.case, done, drawn.folder)
    kind = drawn.kind
    tally.outcomes[kind][fault or ("ok" if done.code == 0 else "refused")] += 1
    tally.memory[kind] = max(tally.memory[kind], done.megabytes)
    tally.slowest[kind] = max(tally.slowest[kind], int(1000 * done.seconds))
    if fault:
        tally.findings.append(keep(drawn, done, fault, place) | {"first in its process": alone})
    shutil.rmtree(drawn.folder)


def keep(each: Drawn, done: Ended, fault: str, place: Path) -> dict[str, Any]:
    """Keep a finding's files and the command that repeats it."""
    name = f"{each.kind}-{each.number}"
    target = place / fault.replace(" ", "-") / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in each.folder.iterdir():
        if path.is_file() and path.stat().st_size < 2**24:
            shutil.copy(path, target)
    words = [word.replace(str(each.folder), str(target)) for word in each.case.words]
    (target / "words.json").write_text(json.dumps(words))
    command = f"python tools/fuzz.py --kind {each.kind} --start {each.number} --cases 1"
    (target / "command.txt").write_text(f"{command}\n")
    last = [line for line in done.err.splitlines() if line.strip()][-1:]
    print(f"{name}: {fault}: {' '.join(last)[:200]} {done.traces[:100]}", file=sys.stderr)
    return {"case": name, "fault": fault, "command": command, "words": words, "last line": " ".join(last)[:300]}


def table(facts: dict[str, Any]) -> str:
    """What was found, by kind."""
    rows = []
    for kind, counts in facts["outcomes"].items():
        faults = Counter({what: count for what, count in counts.items() if what not in ("ok", "refused")})
        memory, slowest = facts["largest memory, MiB"].get(kind, 0), facts["slowest, ms"].get(kind, 0)
        row = (kind, sum(counts.values()), counts.get("refused", 0), counts.get("ok", 0), counted(faults) or "none")
        rows.append((*row, memory, f"{slowest / 1000:.1f}"))
    headings = ("kind", "cases", "one sentence", "worked", "faults", "most memory, MiB", "slowest, s")
    said = {key: facts[key] for key in ("cases", "seconds", "cases per second")}
    return report("fuzz", headings, rows, said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of all kinds together, or of --kind")
    parser.add_argument("--kind", choices=KINDS, help="this kind alone")
    parser.add_argument("--start", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--seconds", type=float, help="start no case later")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="a minute: what continuous integration runs")
    parser.add_argument("--keep", type=Path, default=Path("findings"), help="folder for findings")
    parser.add_argument("--json", type=Path, help="write what was found")
    parser.add_argument("--page", action="store_true", help="put the table into docs/security.md")
    parser.add_argument("--guided", help="a target of tools/guided.py, for --seconds")
    options = parser.parse_args()
    options.keep = options.keep.resolve()
    if options.guided:
        from guided import guide

        guide(options.guided, options.seconds or 60, options.keep)
        return
    kinds = {kind: max(1, round(share * options.cases)) for kind, share in SHARES.items()}
    if options.short:
        kinds = dict(SHORT)
        options.seconds = options.seconds or 40
    if options.kind:
        kinds = {options.kind: options.cases}
    load_everything()
    with tempfile.TemporaryDirectory(prefix="material-") as folder:
        material = make_material(Path(folder))
        if not material.onnx:
            kinds.pop("networks", None)
        print(f"material made, {own_megabytes()} MiB", file=sys.stderr)
        facts = fuzz(material, kinds, options)
    write("fuzz", table(facts), facts, options.json, options.page)
    if facts["findings"]:
        raise SystemExit(f"{len(facts['findings'])} findings in {options.keep}")


if __name__ == "__main__":
    main()
