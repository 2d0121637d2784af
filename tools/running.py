"""What tools/fuzz.py, kills.py and faults.py share: command lines in forked children, with limits.

Importing PyTorch takes seconds, so that a parent imports everything once and each command line runs in a child of its.
The parent itself computes nothing: threads do not survive a fork.
"""

import contextlib
import gc
import importlib
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # factories of small codecs and networks, which the suite has too
os.environ.setdefault("OMP_NUM_THREADS", "1")
PLACES = ("--json", "--keep")  # options that name a place to write to
PAGE = ROOT / "docs/security.md"
CPU_SECONDS = 10  # of one command line; more is a hang
WALL_SECONDS = 60  # a command line that waits for something that never comes
MEMORY = 1536  # MiB that a command line may take over what the parent has: pictures are small here
ADDRESSES = 6144  # MiB of addresses beyond the parent's, so that a bomb takes this process and not the machine
PROGRAMS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "pty.spawn")
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.sendto")
DECOYS = ("gs", "sh", "bash", "convert", "magick", "dvipng", "latex", "curl", "wget", "nvidia-smi", "gcc", "cc")


class Ended(NamedTuple):
    """How a command line ended."""

    code: int | None  # exit code; None where a signal ended it
    signal: int | None
    seconds: float  # of wall clock
    megabytes: int  # of memory at most, those of the parent that it has seen included
    out: str
    err: str
    traces: str  # programs that were started, and hosts that were asked for

    @property
    def fault(self) -> str:
        """What is wrong with it whatever was asked: empty if it worked or ended in one sentence."""
        if self.traces:
            return "network" if self.traces.startswith(NETWORK) else "program started"
        if self.signal in (signal.SIGPROF, signal.SIGALRM):
            return "hang"
        if self.signal is not None:
            return f"signal {signal.Signals(self.signal).name}"
        if "Traceback (most recent call last)" in self.err:
            return "traceback"
        if self.megabytes > own_megabytes() + MEMORY or "out of memory" in self.err:
            return "memory"
        if self.code == 0:
            return ""
        sentences = self.err.count("freqdoor: ")
        if self.code == 2 and (sentences == 1 or (sentences == 0 and "Usage: " in self.err)):
            return ""
        return f"code {self.code} with {sentences} sentences"


def load_everything() -> None:
    """Import what command lines import, so that their processes need not."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs ignore it; runs are stopped by it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    import freqdoor

    torch.set_num_threads(1)
    for name in freqdoor.__all__:
        getattr(freqdoor, name)
    optional = ("numba", "onnx", "onnx2torch", "cv2", "segmentation_models_pytorch")
    for name in ("freqdoor.cli", "compressai.zoo", "matplotlib.figure", "pytorch_msssim", *optional):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import numpy
    import typer
    from PIL import Image

    from freqdoor.cli.options import app
    from freqdoor.codecs import coder, coding

    Image.init()
    typer.main.get_command(app)
    tables = coder.checked_tables(numpy.array([[0, 1, 2**16]]), numpy.array([3]), numpy.array([0]))
    coder.decode(coder.encode([0], [0], tables), [0], tables)  # machine code is loaded or compiled
    with coding.coding():  # what it looks for in all modules is kept
        pass
    gc.collect()
    gc.freeze()  # a child's collector would copy all of it


@contextlib.contextmanager
def decoys(folder: Path) -> Iterator[None]:
    """Programs that leave a trace are all that the PATH leads to."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in DECOYS:
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "$TRACES"\n')
        (folder / name).chmod(0o755)
    before = os.environ["PATH"]
    os.environ["PATH"] = str(folder)
    try:
        yield
    finally:
        os.environ["PATH"] = before


class Command(NamedTuple):
    """A command line, and the folder for its files: it runs in `folder`/work, its output stands beside that."""

    words: Sequence[str]
    folder: Path


def start(commands: Sequence[Command], *, limited: bool = True) -> int:
    """Fork a child that runs command lines one after another; its process number.

    With limits each of them has CPU_SECONDS and WALL_SECONDS, at whose end a signal ends the child.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        if limited:
            _limit()
        for command in commands:
            _run(command, limited)
    except BaseException:
        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESSES * 2**20,) * 2)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        asks_git = event == "subprocess.Popen" and arguments[0] == "git"  # which revision a result was made with
        if (event in PROGRAMS and not asks_git) or event in NETWORK:
            with open(os.environ["TRACES"], "a") as file:
                file.write(f"{event} {arguments!r}\n"[:300])

    sys.addaudithook(watch)


def _run(command: Command, limited: bool) -> None:
    """Run one command line in this process, and write down how it ended."""
    from freqdoor.__main__ import main

    folder = command.folder
    work, temporary = folder / "work", folder / "tmp"
    for place in (work, temporary):
        place.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    os.environ["TRACES"], os.environ["TMPDIR"] = str(folder / "traces"), str(temporary)
    tempfile.tempdir = None
    for number, name in ((0, "/dev/null"), (1, str(folder / "out")), (2, str(folder / "err"))):
        file = os.open(name, os.O_RDWR if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["freqdoor", *command.words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started, code = time.monotonic(), 0
    if limited:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
        signal.setitimer(timer, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    (folder / "ended").write_text(json.dumps([code, time.monotonic() - started, megabytes]))


def own_megabytes() -> int:
    """What this process has in memory, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20


def ended(command: Command, status: int) -> Ended | None:
    """How a command line ended whose child is over; None if the child did not come so far.

    Args:
        status: of the child, as `os.waitpid` has it.
    """
    folder = command.folder
    if not (folder / "err").exists():
        return None
    out, err = ((folder / name).read_text(errors="replace") for name in ("out", "err"))
    traces = (folder / "traces").read_text() if (folder / "traces").exists() else ""
    if (folder / "ended").exists():
        code, seconds, megabytes = json.loads((folder / "ended").read_text())
        return Ended(code, None, seconds, megabytes, out, err, traces)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return Ended(None if number else os.WEXITSTATUS(status), number, 0.0, 0, out, err, traces)


def run(words: Sequence[str], folder: Path) -> Ended:
    """Run one command line to its end, without limits: what a tool needs before it begins."""
    command = Command(words, folder)
    (folder / "ended").unlink(missing_ok=True)
    _, status = os.waitpid(start([command], limited=False), 0)
    done = ended(command, status)
    if done is None or done.code != 0:
        raise SystemExit(f"freqdoor {' '.join(words)}: {done and done.code} {done and done.err}")
    return done


def report(subject: str, headings: Sequence[str], rows: Sequence[Sequence[object]], facts: dict[str, Any]) -> str:
    """A subject's table as Markdown with the command, the date and the machine."""
    lines = [" | ".join(map(str, row)) for row in (headings, ["---"] * len(headings), *rows)]
    words = iter(sys.argv[1:])  # without the places of this machine
    asked = [word for word in words if word not in PLACES or not next(words)]
    made = f"`python tools/{' '.join([subject + '.py', *asked])}`, {datetime.now(UTC):%Y-%m-%d}, {machine()}"
    said = "; ".join(f"{name}: {value}" for name, value in facts.items())
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{made}. {said}.\n"


def machine() -> str:
    """The processor, Python and PyTorch that a figure was measured with."""
    import torch

    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()]
    models = [name for name in names if any(brand in name for brand in ("Intel", "AMD", "ARM"))]
    model = next((name for name in models if name not in ("GenuineIntel", "AuthenticAMD")), platform.machine())
    return f"{model}, Python {platform.python_version()}, PyTorch {torch.__version__}"


def write(subject: str, table: str, facts: dict[str, Any], json_file: Path | None, page: bool) -> None:
    """Print a subject's table; keep the facts as JSON and the table in docs/security.md where that is wanted."""
    print(table)
    if json_file:
        json_file.write_text(json.dumps(facts, indent=1) + "\n")
    if page:
        text, begin, end = PAGE.read_text(), f"<!-- {subject} -->\n", f"<!-- end of {subject} -->"
        head, _, rest = text.partition(begin)
        PAGE.write_text(head + begin + "\n" + table + "\n" + end + rest.partition(end)[2])


def counted(values: Counter[str]) -> str:
    """ "3 refused, 2 ok" """
    return ", ".join(f"{count} {what}" for what, count in values.most_common())
