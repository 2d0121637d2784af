"""A stop from outside: raised in the package's own work, the end at once wherever a library would swallow it."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from freqdoor import __main__ as entry
from freqdoor.errors import Terminated


def stack(*names: str) -> SimpleNamespace | None:
    """Frames of code in these files, the innermost first."""
    frame = None
    for name in reversed(names):
        frame = SimpleNamespace(f_code=SimpleNamespace(co_filename=name), f_back=frame)
    return frame


WORK, SHELL = os.path.join(entry.PACKAGE, "data.py"), os.path.join(entry.PACKAGE, "cli/attack.py")


@pytest.mark.parametrize(
    ("frames", "working"),
    [
        ((WORK, SHELL, entry.__file__), True),
        (("/usr/lib/torch/nn.py", WORK, SHELL), True),
        ((SHELL, entry.__file__), False),
        (("/usr/lib/click/core.py", SHELL), False),
        (("/usr/lib/torch/nn.py", "<frozen importlib._bootstrap>", WORK), False),
        ((f"{entry.PACKAGE}-theirs/data.py",), False),
    ],
)
def test_where_a_stop_is_raised(frames, working, monkeypatch):
    left = []
    monkeypatch.setattr(entry, "_leave", left.append)
    if working:
        with pytest.raises(Terminated):
            entry._stop(signal.SIGTERM, stack(*frames))
    else:
        entry._stop(signal.SIGINT, stack(*frames))
        assert [type(stop) for stop in left] == [KeyboardInterrupt]


def test_what_is_swallowed_in_a_destructor_comes_again(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", entry._stop_again)
    before = signal.signal(signal.SIGTERM, lambda number, frame: entry._stop(number, None))

    class Last:
        def __del__(self) -> None:
            raise Terminated

    def lose_one() -> None:
        Last()
        time.sleep(5)

    try:
        with pytest.raises(Terminated):
            lose_one()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stop_while_pytorch_loads_is_one_sentence(tmp_path):
    code = "import sys; sys.argv[1:] = ['decompress', 'no.fqd', 'x.png']; from freqdoor.__main__ import main; main()"
    words = [sys.executable, "-X", "importtime", "-c", code]
    said, sent = b"", False
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE) as program:
        for line in program.stderr:
            said += line if not line.startswith(b"import time:") else b""
            if b"torch" in line and not sent:
                program.send_signal(signal.SIGTERM)
                sent = True
    assert program.returncode == 143
    assert said.decode() == f"freqdoor: {entry.STOPPED}\n"
