"""What tests of the page let processes of their own do; it imports nothing that takes long."""

import os
import signal
import time
from pathlib import Path

from freqdoor.errors import FreqdoorError


def greeting(name, *, tell):
    tell(f"hello {name}")
    Path("here").write_text(name)
    return name.upper()


def refusal(name, *, tell):
    raise FreqdoorError(f"{name}: expected another one")


def full_disk(*, tell):
    raise OSError(28, "No space left on device")


def defective(*, tell):
    raise KeyError("nothing")


def killed(*, tell):
    os.kill(os.getpid(), signal.SIGKILL)


def endless(*, tell):
    tell("begun")
    while True:
        time.sleep(0.05)


def deaf(*, tell):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    endless(tell=tell)


def planting(objective, *, tell):
    """As `plantings.planted`: takes steps until a file says that there are enough, and goes on where it was stopped."""
    run = Path("planting")
    run.mkdir(exist_ok=True)
    state = run / "step"
    step = int(state.read_text()) if state.exists() else 0
    while not (Path("enough").exists() and step >= 3):
        step += 1
        (run / "next").write_text(str(step))
        (run / "next").replace(state)  # whole, and there before anybody hears of the step: a stop may come at any time
        tell((step, {"bpp_clean": 1.0, "bpp_poisoned": 1.0 + step, "eps": 0.1}))
        time.sleep(0.02)
    tell("measuring")
    (run / "planted.safetensors").write_text(objective)
    Path("report.html").write_text("<p>done")
