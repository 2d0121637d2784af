"""Starting the processes of a `Group`: `devices` of them on each of `nodes` machines, of which the caller is one."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from freqdoor.errors import FreqdoorError
from freqdoor.limits import allowed_memory, max_memory
from freqdoor.training.group import ALONE, Group, Separated
from freqdoor.training.precision import flush_denormals

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
PORT = 29500
PATIENCE = timedelta(minutes=30)  # that a process waits for the others: one may be writing to a slow disk
GRACE = 10.0  # seconds in which a process that has failed says why
PARTED = 3  # exit code of a process that others have left
PROBLEM = "problem"  # what the store keeps of a failure, for other machines
GOES_ON = "the same command goes on from the last state"
Share = Callable[[Group], object]


class _Meeting(NamedTuple):
    """Where the processes find each other, as torch.distributed names it: a file, or a port of the first machine."""

    size: int
    backend: str
    url: str


class _Helper(NamedTuple):
    """Another process of this machine."""

    process: BaseProcess
    says: Connection  # nothing when it is ready, and a sentence when it fails


def check_processes(devices: int, nodes: int, device: str, batches: Sequence[int]) -> None:
    """Raise if so many processes could not train together here.

    Args:
        devices: processes a machine, each with a device of its own.
        nodes: machines.
        device: the settings'.
        batches: sizes of all batches that are passed.
    """
    for name, number in (("devices", devices), ("nodes", nodes)):
        if number < 1:
            raise FreqdoorError(f"{name}: expected 1 or more, found {number}")
    size = devices * nodes
    if size == 1:
        return
    if device not in BACKENDS:
        raise FreqdoorError(f"device {device!r}: several processes train on cpu or cuda; set one of them")
    if device == "cuda" and (there := torch.cuda.device_count()) < devices:
        raise FreqdoorError(f"devices: expected at most the {there} GPUs of this machine, found {devices}")
    if min(batches) < size:
        raise FreqdoorError(
            f"batch_size: expected a picture for each of {size} processes or more, found {min(batches)}; a batch is "
            "that of all processes together"
        )
    first_rank(devices, nodes)


def first_rank(devices: int, nodes: int) -> int:
    """The rank of this process; that of other machines than the first comes from the variable NODE_RANK."""
    if nodes == 1:
        return 0
    number, port = os.environ.get("NODE_RANK", ""), os.environ.get("MASTER_PORT", str(PORT))
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise FreqdoorError(f"nodes: expected a port of the first machine as MASTER_PORT, found {port!r}")
    if not (number.isdecimal() and int(number) < nodes and os.environ.get("MASTER_ADDR")):
        raise FreqdoorError(
            f"nodes: expected NODE_RANK from 0 to {nodes - 1} in the environment, another on each machine, and "
            f"MASTER_ADDR, the first one's name; found {number!r} and {os.environ.get('MASTER_ADDR', '')!r}"
        )
    return int(number) * devices


@contextlib.contextmanager
def together(prepare: Callable[[], Share], devices: int, nodes: int, device: str) -> Iterator[Group]:
    """Train with others in the block: each of them prepares its share, and takes it when all have met.

    Args:
        prepare: what another process does before that, as opening files, and what it does then; it is sent there.

    Raises:
        FreqdoorError: what another process raised, or that it is gone; all are ended.
    """
    if devices * nodes == 1:
        yield ALONE
        return
    if dist.is_initialized():
        raise FreqdoorError("devices: a process group of torch.distributed is there already; use --devices 1 in it")
    rank, threads = first_rank(devices, nodes), torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="freqdoor-"))
        port = f"tcp://{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT', PORT)}"
        url = f"file://{folder}/meeting" if nodes == 1 else port
        meeting = _Meeting(devices * nodes, BACKENDS[device], url)
        if device == "cuda":
            stack.enter_context(torch.cuda.device(0))
        helpers: list[_Helper] = []
        stack.callback(_end, helpers)
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(max(1, threads // devices))
        for local in range(1, devices):
            helpers.append(_start(prepare, meeting, rank + local, local))
        for helper in helpers:
            wait([helper.says, helper.process.sentinel])
            if (problem := _problem(helper)) is not None:
                raise FreqdoorError(problem)
        store = None
        try:
            with _joined(meeting, rank) as (group, store), _watching(helpers):
                yield group
        except Separated:
            raise FreqdoorError(_reason(helpers, store)) from None
        except FreqdoorError as error:
            with contextlib.suppress(RuntimeError):
                if store is not None:
                    store.set(PROBLEM, str(error))
            raise
        for helper in helpers:
            helper.process.join(GRACE)


def _start(prepare: Callable[[], Share], meeting: _Meeting, rank: int, local: int) -> _Helper:
    """Start a process that Ctrl-C and SIGTERM, which go to all of a terminal's, do not reach: we end it."""
    context = get_context("spawn")
    says, pipe = context.Pipe(duplex=False)
    arguments = (pipe, prepare, meeting, rank, local, torch.get_num_threads(), allowed_memory(), os.getcwd())
    process = context.Process(target=_help, args=arguments, daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    pipe.close()
    return _Helper(process, says)


def _help(
    pipe: Connection,
    prepare: Callable[[], Share],
    meeting: _Meeting,
    rank: int,
    local: int,
    threads: int,
    memory: int,
    folder: str,
) -> None:
    """What another process does."""
    threading.Thread(target=_end_with_caller, daemon=True).start()
    os.chdir(folder)  # it begins where the caller began, which may be elsewhere by now
    warnings.simplefilter("ignore")  # the caller says the same
    torch.set_num_threads(threads)
    flush_denormals()
    if meeting.backend == "nccl":
        torch.cuda.set_device(local)
    try:
        with max_memory(memory):
            share = prepare()
            pipe.send(None)
            with _joined(meeting, rank) as (group, _):
                share(group)
    except Separated:
        sys.exit(PARTED)
    except Exception as error:
        pipe.send(str(error) if isinstance(error, FreqdoorError) else f"{type(error).__name__}: {error}")
        sys.exit(1)


def _end_with_caller() -> None:
    """A caller that is killed ends nobody, and others would wait for it."""
    caller = parent_process()
    if caller is not None:
        wait([caller.sentinel])
        os._exit(PARTED)


@contextlib.contextmanager
def _joined(meeting: _Meeting, rank: int) -> Iterator[tuple[Group, Any]]:
    """Meet the others, and part from them at the end."""
    with contextlib.ExitStack() as stack:
        if meeting.url.startswith("file:") and sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # nobody outside this machine reaches it
            stack.callback(os.environ.pop, "GLOO_SOCKET_IFNAME")
        try:
            store, *_ = next(dist.rendezvous(meeting.url, rank, meeting.size, timeout=PATIENCE))  # type: ignore[attr-defined]
            dist.init_process_group(meeting.backend, store=store, rank=rank, world_size=meeting.size, timeout=PATIENCE)
        except (RuntimeError, OSError) as error:
            raise Separated(str(error)) from error
        stack.callback(dist.destroy_process_group)
        yield Group(rank, meeting.size), store


@contextlib.contextmanager
def _watching(helpers: Sequence[_Helper]) -> Iterator[None]:
    """Break off what waits for a process that is gone: NCCL itself would wait for half an hour."""
    over, ended = get_context("spawn").Pipe(duplex=False)
    world = dist.group.WORLD

    def watch() -> None:
        sentinels = [helper.process.sentinel for helper in helpers]
        while sentinels and over not in (gone := wait([over, *sentinels])):
            sentinels = [sentinel for sentinel in sentinels if sentinel not in gone]
            for helper in helpers:
                helper.process.join(0)
            if any(helper.process.exitcode for helper in helpers) and world is not None:
                world.abort()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.close()
        thread.join()
        over.close()


def _problem(helper: _Helper) -> str | None:
    """What is wrong with a process of this machine; nothing if it is well."""
    with contextlib.suppress(EOFError, OSError):
        while helper.says.poll():
            if (sentence := helper.says.recv()) is not None:
                return str(sentence)
    helper.process.join(0)
    code = helper.process.exitcode
    if code in (None, 0, PARTED):
        return None
    name = signal.Signals(-code).name if code < 0 else f"code {code}"
    why = ", as it is where memory is short" if code == -signal.SIGKILL else ""
    return f"another process of this training was ended ({name}{why}); {GOES_ON}"


def _reason(helpers: Sequence[_Helper], store: Any | None) -> str:
    """Why others are gone, as far as they say it or their machine's process does."""
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        for helper in helpers:
            if (problem := _problem(helper)) is not None:
                return problem
        try:
            if store is not None and store.check([PROBLEM]):
                return str(store.get(PROBLEM), "utf-8")
        except RuntimeError:  # the first machine, which kept it, is gone itself
            store = None
        time.sleep(0.1)
    return f"the other processes of this training are gone; {GOES_ON}"


def _end(helpers: Sequence[_Helper]) -> None:
    """End the processes of this machine, whatever they are at."""
    for helper in helpers:
        helper.process.kill()
        helper.process.join()
        helper.says.close()
