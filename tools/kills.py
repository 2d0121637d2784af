"""Runs that are killed at random moments and started again: whether the end is that of a run that nobody disturbed.

python tools/kills.py --times 100 --json kills.json --page     # the long run of docs/security.md
python tools/kills.py --short                                  # half a minute
python tools/kills.py --verb plant --start 17 --times 1        # one of them again

Seven of ten are stopped by SIGKILL, the others by Ctrl-C or SIGTERM, which have to end in one sentence; every third run
is stopped twice. The results are compared byte by byte; what a clock measured is left out.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from hostile import make_codecs, picture, planting
from running import Command, counted, ended, load_everything, report, run, start, write

from freqdoor.errors import STOPPED

# in names of what clocks tell, or what hashes it
TIMED = ("second", "time", "date", "minutes", "created", "started", "finished", "speed", "records_sha256")
COMPARED = (".json", ".jsonl", ".md", ".safetensors", ".csv")
VERBS = ("plant", "train-codec", "evaluate", "reproduce")


def command_lines(folder: Path) -> dict[str, list[str]]:
    """A small run of each verb; each writes into the folder where it runs."""
    codecs, _ = make_codecs(folder)
    photos = folder / "photos"
    photos.mkdir()
    for i in range(4):
        picture(i, 64, 64).save(photos / f"{i}.png")
    few = [*planting(codecs[0], photos), "steps=6", "checkpoint_minutes=1e-6"]
    sets = [word for text in few for word in ("--set", text)]
    run(["plant", "--out", str(folder / "planted"), *sets], folder / "run")
    training = [
        f"images.folder={photos}",
        "images.crop=64",
        "images.batch_size=1",
        "codec=lite-hyperprior:3",
        "steps=6",
    ]
    training += ["klt=false", "precision=fp32", "checkpoint_minutes=1e-6", "validate_every=2"]
    shorter = [word for text in [*few, "steps=2"] if not text.startswith("trigger") for word in ("--set", text)]
    return {
        "plant": ["plant", "--out", "out", *sets],
        "train-codec": ["train-codec", "--out", "out", *(word for text in training for word in ("--set", text))],
        "evaluate": [
            *("evaluate", str(folder / "planted"), "--images", str(photos), "--out", "out", "--codec", str(codecs[0])),
            *("--strength", "1", "--strength", "2"),
        ],
        "reproduce": [
            *("reproduce", "figure4", "--images", str(photos), "--rows", "vanilla;FTrojan;universal pattern"),
            *("--seeds", "1", "--out", "out", "--runs", "runs", *shorter),
        ],
    }


def content(folder: Path) -> dict[str, Any]:
    """What a run has written, by file; without what a clock measured."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in COMPARED or path.name.startswith("."):
            continue
        name = str(path.relative_to(folder))
        if path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [timeless(json.loads(line)) for line in lines]
        elif path.suffix == ".safetensors":
            found[name] = tensors(path)
        elif path.suffix == ".md":
            found[name] = [
                line for line in path.read_text().splitlines() if "minute" not in line and "second" not in line
            ]
        else:
            found[name] = path.read_bytes()
    return found


def tensors(path: Path) -> Any:
    """The bytes of all tensors, and the header without what a clock measured."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    ours = timeless(json.loads(header.pop("__metadata__", {}).get("freqdoor", "null")))
    if isinstance(ours, dict):
        ours.pop("digest", None)  # of the seconds too
    return header, ours, data[8 + size :]


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if not any(word in key for word in TIMED)}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The files that differ, lack or are too many."""
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)]


def disturbed(words: list[str], folder: Path, random: Random, seconds: float) -> list[str]:
    """Start a command, stop it once or twice, and let it end; what is wrong."""
    problems = []
    command = Command(words, folder)
    for _ in range(2 if random.random() < 1 / 3 else 1):
        number = signal.SIGKILL if random.random() < 0.7 else random.choice([signal.SIGINT, signal.SIGTERM])
        forget(folder)
        pid = start([command], limited=False)
        while not (folder / "err").exists():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 1.05 * seconds))
        os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
        done = ended(command, status)
        assert done is not None
        code = {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number)
        if number != signal.SIGKILL and done.code not in (0, code) and done.signal != number:
            problems.append(f"{number.name}: ended with {done.code}: {done.err.strip()[-200:]}")
        if code and done.code == code and done.err.count("freqdoor: ") != 1:
            problems.append(f"{number.name}: expected “{STOPPED}”, found {done.err.strip()[-200:]}")
    forget(folder)
    _, status = os.waitpid(start([command], limited=False), 0)
    done = ended(command, status)
    if done is None or done.code != 0:
        problems.append(f"the same command again: {done and done.code}: {done and done.err.strip()[-300:]}")
    return problems


def forget(folder: Path) -> None:
    for name in ("err", "out", "ended"):
        (folder / name).unlink(missing_ok=True)


def kills(verbs: tuple[str, ...], options: argparse.Namespace, until: float | None) -> dict[str, Any]:
    """Disturb runs of all verbs in turn."""
    outcomes: dict[str, Counter[str]] = {verb: Counter() for verb in verbs}
    problems: list[dict[str, Any]] = []
    undisturbed: dict[str, tuple[dict[str, Any], float]] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        place = Path(name)
        commands = command_lines(place)
        for number in range(options.start, options.start + options.times):
            for verb in verbs:
                if until and time.monotonic() > until:
                    break
                if verb not in undisturbed:
                    done = run(commands[verb], place / verb)
                    undisturbed[verb] = content(place / verb / "work"), done.seconds
                expected, seconds = undisturbed[verb]
                folder = place / f"{verb}-{number}"
                found = disturbed(commands[verb], folder, Random(f"{verb} {number}"), seconds)
                if not found:
                    found = [f"differs: {file}" for file in differences(content(folder / "work"), expected)]
                outcomes[verb]["other" if found else "same"] += 1
                if found:
                    problems.append({"verb": verb, "number": number, "problems": found})
                    print(f"{verb} {number}: {'; '.join(found)[:400]}", file=sys.stderr)
                shutil.rmtree(folder)
    return {"outcomes": {verb: dict(counts) for verb, counts in outcomes.items()}, "problems": problems}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=25, help="of each verb")
    parser.add_argument("--start", type=int, default=0, help="number of the first one")
    parser.add_argument("--verb", choices=VERBS, help="this verb alone")
    parser.add_argument("--short", action="store_true", help="half a minute: what continuous integration runs")
    parser.add_argument("--json", type=Path, help="write what was found")
    parser.add_argument("--page", action="store_true", help="put the table into docs/security.md")
    options = parser.parse_args()
    load_everything()
    began = time.monotonic()
    facts = kills((options.verb,) if options.verb else VERBS, options, began + 22 if options.short else None)
    rows = [(verb, sum(c.values()), c.get("same", 0), c.get("other", 0)) for verb, c in facts["outcomes"].items()]
    headings = ("verb", "runs that were stopped", "same end", "other end or words")
    facts["seconds"] = round(time.monotonic() - began)
    total = Counter({what: sum(c.get(what, 0) for c in facts["outcomes"].values()) for what in ("same", "other")})
    text = report("kills", headings, rows, {"all": counted(total), "seconds": facts["seconds"]})
    write("kills", text, facts, options.json, options.page)
    if facts["problems"]:
        raise SystemExit(f"{len(facts['problems'])} runs did not end as they should")


if __name__ == "__main__":
    main()
