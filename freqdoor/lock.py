"""One process a folder: a lock that the system releases when its holder ends, however it ends."""

import contextlib
import errno
import functools
import inspect
import json
import os
import socket
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from freqdoor.errors import FreqdoorError

try:
    import fcntl
except ImportError:  # a system without it has no locks of this kind
    fcntl = None  # type: ignore[assignment]

LOCK = ".freqdoor.lock"
WAIT = 0.5  # seconds between two looks at a folder that is waited for
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # of some network file systems
P = ParamSpec("P")
R = TypeVar("R")
_held: dict[str, tuple[int, BinaryIO]] = {}  # folder -> the thread that holds it, and its open lock file


def _let_go_after_fork() -> None:
    """A child process has copies of the open files, with which it would hold what its parent has left."""
    for _, file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_after_fork)


def let_go() -> None:
    """Remove the lock files of a process that is about to end at once."""
    for folder in list(_held):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, LOCK))


@contextlib.contextmanager
def holding(folder: Path | str, verb: str, *, wait: bool = False) -> Iterator[Path]:
    """Hold a folder for as long as the block runs; what holds it already, in the same thread, may hold it again.

    The folder is made if there is none, and removed again if it is left empty.

    Args:
        wait: until nobody else holds it, where the other one makes what is wanted here too.

    Raises:
        FreqdoorError: another process or thread holds it, unless it is waited for; or nothing can be written there.
    """
    folder = Path(folder)
    key = os.path.realpath(folder)
    if key in _held and _held[key][0] == threading.get_ident():
        yield folder
        return
    check_folder(folder)
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _opened(folder)
    except OSError as error:
        raise FreqdoorError(f"{folder}: could not write ({error.strerror})") from None
    with file:
        while not _locked(file, folder):
            if not wait:
                raise FreqdoorError(f"{folder}: freqdoor {_holder(file)}; wait for it or choose another folder")
            time.sleep(WAIT)
        _held[key] = threading.get_ident(), file
        try:
            with contextlib.suppress(OSError):  # a full disk: nobody can say who holds it, it is held all the same
                file.truncate(0)
                file.write(_own(verb))
            yield folder
        finally:
            del _held[key]
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()  # while it is held: whoever has opened it meanwhile sees that it is gone
                for path in made:
                    path.rmdir()  # OSError: there is something in it


def alone(verb: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function hold the folder that its argument `out` names (`holding`) while it runs."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*arguments: P.args, **options: P.kwargs) -> R:
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()
            with holding(bound.arguments["out"], verb):
                return function(*arguments, **options)

        return run

    return decorate


def check_folder(folder: Path | str) -> None:
    """Raise if a folder cannot be made or written into; nothing is made."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.parents, Path(".")) if os.path.lexists(path))
    if not os.path.isdir(there):
        raise FreqdoorError(f"{folder}: could not write ({there} is no folder); choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FreqdoorError(f"{folder}: could not write (no permission in {there}); choose another folder")


def _opened(folder: Path) -> BinaryIO:
    """The lock file, which is made if there is none; raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = os.fdopen(os.open(folder / LOCK, flags, 0o666), "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, f"{LOCK} is a device or a pipe")
    return file


def _locked(file: BinaryIO, folder: Path) -> bool:
    """Lock the open file; False if another process holds it."""
    if fcntl is None:
        return True
    try:
        while True:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.lstat(folder / LOCK)):
                    return True
            # the holder before has removed it between the opening and the locking: take the one that is there now
            with contextlib.suppress(FileNotFoundError):
                folder.mkdir(parents=True, exist_ok=True)  # which it may have removed as well
                with _opened(folder) as newer:
                    os.dup2(newer.fileno(), file.fileno(), inheritable=False)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in NO_LOCKS:
            raise FreqdoorError(f"{folder}: could not lock ({error.strerror})") from None
    warnings.warn(f"{folder}: this file system has no locks; let no second process write here", stacklevel=4)
    return True


def _own(verb: str) -> bytes:
    """What the lock file says of this process."""
    since = time.strftime("%H:%M")
    return json.dumps({"verb": verb, "pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()


def _holder(file: BinaryIO) -> str:
    """Who holds a lock, in words."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        says = json.loads(os.pread(file.fileno(), 4096, 0))
        verb, host, since = (str(says[key])[:64] for key in ("verb", "host", "since"))
        return f"{verb} holds this folder (process {int(says['pid'])} on {host} since {since})"
    return "is at work in this folder already"
