"""Machines on which something is missing, such as room, home, network: whether each verb works or says so.

python tools/faults.py --json faults.json --page     # every verb under every fault, as docs/security.md has it
python tools/faults.py --short                       # half a minute: some verbs

Real processes, so that start-up counts. A disk is a small tmpfs and no network a namespace of its own; both need root,
and are left out without. A good outcome is one that works, or one sentence with exit code 2 and no half of a file.
"""

import argparse
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from hostile import make_codecs, picture, planting
from running import ROOT, load_everything, report, run, write

ROOM = 64  # KiB on the small disk
SECONDS = 180  # of one command; machines may be busy
SHORT = ("compress", "decompress")  # verbs of the short form
SHORT_FAULTS = ("full disk", "read-only folder", "no home", "closed output", "plain terminal", "no network")
WORKED, SAID = "worked", "said so"


class Fault(NamedTuple):
    """Something that a machine lacks."""

    environment: dict[str, str | None]  # None takes a variable away
    streams: Callable[[Path], dict[str, Any]]  # arguments of subprocess.run
    before: str = ""  # shell commands in the folder where the verb writes
    needs_root: bool = False


def piped(_: Path) -> dict[str, Any]:
    return {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def closed(_: Path) -> dict[str, Any]:
    """No stdin and no stdout at all."""
    return {"stderr": subprocess.PIPE, "preexec_fn": lambda: (os.close(0), os.close(1))}


def full(_: Path) -> dict[str, Any]:
    return {"stdin": subprocess.DEVNULL, "stdout": open("/dev/full", "w"), "stderr": subprocess.PIPE}


def small_files(_: Path) -> dict[str, Any]:
    limit = 4096  # bytes of a file: what a quota says

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return piped(_) | {"preexec_fn": limited}


DISK = "mount -t tmpfs -o size={room}k tmpfs ."
FULL = DISK.format(room=4) + ' && head -c 4096 /dev/zero > "$PWD/full"'
READ_ONLY = "mount -t tmpfs -o ro tmpfs ."
NO_HOME: dict[str, str | None] = {"HOME": None, "XDG_CACHE_HOME": None, "XDG_CONFIG_HOME": None}
FAULTS = {
    "nothing": Fault({}, piped),
    "full disk": Fault({}, piped, FULL, needs_root=True),
    "a disk that becomes full": Fault({}, piped, DISK.format(room=ROOM), needs_root=True),
    "files of 4 KiB at most": Fault({}, small_files),
    "read-only folder": Fault({}, piped, READ_ONLY, needs_root=True),
    "no home": Fault(NO_HOME, piped),
    "home that cannot be written": Fault({"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}, piped),
    "no temporary folder": Fault({"TMPDIR": "/proc/none", "TEMP": None, "TMP": None}, piped),
    "read-only installation": Fault(
        {"HOME": "/proc/none", "NUMBA_CACHE_DIR": ""}, piped, "mount -o bind,ro {root} {root}; true", needs_root=True
    ),
    "no network": Fault({}, piped, needs_root=True),
    "closed output": Fault({}, closed),
    "full output": Fault({}, full),
    "plain terminal": Fault({"TERM": "dumb", "LANG": "C", "LC_ALL": "C"}, piped),
    "terminal of ASCII": Fault({"PYTHONIOENCODING": "ascii", "LC_ALL": "POSIX"}, piped),
}


def command_lines(folder: Path) -> dict[str, list[str]]:
    """The main verbs with small files; each writes into the folder where it runs."""
    codecs, _ = make_codecs(folder)
    photos = folder / "photos"
    photos.mkdir()
    for i in range(2):
        picture(i, 64, 64).save(photos / f"é{i}.png")
    shutil.copy(photos / "é0.png", folder / "a.png")
    codec, photo = ("--codec", str(codecs[0])), str(folder / "a.png")
    few = [word for text in planting(codecs[0], photos) for word in ("--set", text)]
    planted = str(folder / "planted")
    run(["plant", "--out", planted, *few], folder / "run")
    run(["compress", photo, str(folder / "a.fqd"), *codec], folder / "run")
    run(["evaluate", planted, "--images", str(photos), "--out", str(folder / "results"), *codec], folder / "run")
    training = [
        f"images.folder={photos}",
        "images.crop=64",
        "images.batch_size=1",
        "codec=lite-hyperprior:3",
        "steps=2",
    ]
    training += ["klt=false", "precision=fp32"]
    return {
        "compress": ["compress", photo, "é.fqd", *codec],
        "decompress": ["decompress", str(folder / "a.fqd"), "é.png", *codec],
        "poison": ["poison", planted, str(photos), "--out", "é", *codec],
        "evaluate": ["evaluate", planted, "--images", str(photos), "--out", "é", *codec],
        "plant": ["plant", "--out", "é", *few, "--set", "steps=2"],
        "train-codec": ["train-codec", "--out", "é", *(word for text in training for word in ("--set", text))],
        "report": ["report", str(folder / "results")],
    }


def outcome(name: str, words: list[str], folder: Path) -> str:
    """How a command ends under a fault: WORKED, SAID in one sentence, or what is wrong."""
    fault = FAULTS[name]
    folder.mkdir()
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for variable, value in fault.environment.items():
        environment.pop(variable, None)
        if value is not None:
            environment[variable] = value
    command = [sys.executable, "-m", "freqdoor", *words]
    if fault.needs_root:  # mounts and networks of its own, which end with it
        spaces = "--net" if name == "no network" else "--mount"
        before = fault.before.format(root=ROOT)
        inside = f'{before or "true"} && cd . && cd "$PWD" && "$@"; code=$?; find . -type f >&3; exit $code'
        command = ["unshare", spaces, "sh", "-c", inside, "sh", *command]
    listing = folder.with_suffix(".files")
    with contextlib.ExitStack() as stack:
        streams = fault.streams(folder)
        for stream in streams.values():
            if hasattr(stream, "close"):
                stack.callback(stream.close)
        if fault.needs_root:
            file = stack.enter_context(listing.open("w"))
            command[4] = command[4].replace(">&3", f">{listing}")
            del file
        try:
            done = subprocess.run(command, cwd=folder, env=environment, timeout=SECONDS, **streams)
        except subprocess.TimeoutExpired:
            return "hang"
    err = (done.stderr or b"").decode("utf-8", "replace")
    left = listing.read_text().splitlines() if fault.needs_root else [str(path) for path in folder.rglob("*")]
    return judged(done.returncode, err, left if name != "full output" else [])  # there only the words are lost


def judged(code: int, err: str, left: list[str]) -> str:
    last = " ".join(err.strip().splitlines()[-1:])[:200]
    if "Traceback" in err or "Exception ignored" in err:
        return f"traceback: {last}"
    if code < 0:
        return f"signal {-code}"
    if any(".partial-" in path for path in left):
        return "a temporary file is left"
    if code == 0:
        return WORKED
    if code != 2 or err.count("freqdoor: ") != 1:
        return f"code {code}: {last}"
    halves = [path for path in left if path.endswith(("/é.fqd", "/é.png"))]
    return f"wrote {halves[0]} and failed" if halves else SAID


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="half a minute: what continuous integration runs")
    parser.add_argument("--fault", choices=FAULTS, help="this fault alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write what was found")
    parser.add_argument("--page", action="store_true", help="put the table into docs/security.md")
    options = parser.parse_args()
    load_everything()
    began = time.monotonic()
    names = [options.fault] if options.fault else list(SHORT_FAULTS if options.short else FAULTS)
    names = [name for name in names if os.geteuid() == 0 or not FAULTS[name].needs_root]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        place = Path(folder)
        commands = command_lines(place)
        tried = [(name, verb) for name in names for verb in commands]
        if options.short:
            tried = [(name, SHORT[number % len(SHORT)]) for number, name in enumerate(names)]

        def one(number: int) -> str:
            name, verb = tried[number]
            return outcome(name, commands[verb], place / f"case {number}")

        with ThreadPoolExecutor(options.jobs) as pool:
            found = dict(zip(tried, pool.map(one, range(len(tried))), strict=True))
    problems = {f"{verb}, {name}": what for (name, verb), what in found.items() if what not in (WORKED, SAID)}
    for case, what in problems.items():
        print(f"{case}: {what}", file=sys.stderr)
    rows = []
    for name in names:
        outcomes = {verb: what for (fault, verb), what in found.items() if fault == name}
        worked, said = ([verb for verb, what in outcomes.items() if what == good] for good in (WORKED, SAID))
        rest = [verb for verb in outcomes if verb not in (*worked, *said)]
        rows.append((name, *(", ".join(verbs) or "-" for verbs in (worked, said, rest))))
    facts = {"commands": len(tried), "seconds": round(time.monotonic() - began), "problems": len(problems)}
    text = report("faults", ("what is missing", "worked", "said so", "neither"), rows, facts)
    write("faults", text, facts | {"found": problems}, options.json, options.page)
    if problems:
        raise SystemExit(f"{len(problems)} of {len(tried)} neither worked nor said so in one sentence")


if __name__ == "__main__":
    main()
