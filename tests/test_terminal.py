"""What a log hears while a verb works, and how a verb ends when it is stopped from outside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.table import Table

import freqdoor.cli as cli
from freqdoor.cli import terminal
from freqdoor.cli.options import app
from freqdoor.cli.terminal import every_minute, harmless, live, note, say, say_page, show_trace, warn
from freqdoor.errors import STOPPED

pytestmark = pytest.mark.whole

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}


def test_a_log_hears_every_minute_where_the_verb_is(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "MINUTE", 0.2)
    with every_minute("plant"):
        note("[bold]reading[/bold] pictures")
        time.sleep(0.3)
        with live(40, "planting") as show:
            show(7, {"loss": 0.5})
            time.sleep(0.25)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "plant, minute 1: [bold]reading[/bold] pictures",
        "plant, minute 2: planting, step 7 of 40, loss 0.500",
    ]
    time.sleep(0.3)
    assert capsys.readouterr().err == ""  # it is silent when the verb has ended


def test_a_quick_verb_says_nothing_to_a_log(capsys):
    with every_minute("compress"):
        note("done in a moment")
    assert capsys.readouterr().err == ""


def start(*words: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "freqdoor", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0])
def test_ctrl_c_while_libraries_load_is_one_sentence(seconds, tmp_path):
    process = start("compress", "a.png", "b.fqd", cwd=tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if process.returncode == 2:  # it was faster and has found out that there is no picture
        assert "a.png" in err
    elif process.returncode == -signal.SIGINT:
        assert seconds == 0.1  # Python itself was still starting
    else:
        assert (process.returncode, out, err.strip()) == (130, "", f"freqdoor: {STOPPED}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow  # tools/kills.py --short does the same with every test run
def test_a_stopped_planting_goes_on_where_it_was(images, tmp_path, number, code):
    settings = ["codec=factories:lite", f"images.folder={images}", "images.crop=64", "images.batch_size=2"]
    settings += ["lmbda=0.01", "steps=100000", "precision=fp32"]
    words = ["plant", "--out", "run", *(word for text in settings for word in ("--set", text))]
    process = start(*words, cwd=tmp_path)
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (code, f"freqdoor: {STOPPED}")
    steps = metrics.read_text().count("\n")
    assert (tmp_path / "run/state.pt").exists()
    process = start(*words, cwd=tmp_path)
    while metrics.read_text().count("\n") < steps + 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    numbers = [line.split('"step": ')[1].split(",")[0] for line in metrics.read_text().splitlines()[: steps + 1]]
    assert numbers == [str(i) for i in range(1, steps + 2)]  # it went on behind the last step, and took none twice


HOSTILE = "a\x1b[2J\x1b]0;title\x07\rb\x9b1m\u202egnp.\u2066\udcff\x00\u2028[link=x]c[/link]:smile:"
SHOWN = r"a\x1b[2J\x1b]0;title\x07\rb\x9b1m\u202egnp.\u2066\udcff\x00\u2028[link=x]c[/link]:smile:"  # as it may be seen


def test_what_acts_on_a_terminal_is_shown_and_the_rest_stays():
    assert harmless(HOSTILE) == SHOWN
    assert harmless(SHOWN) == SHOWN
    assert harmless("Zürich, 日本/é.png 🙂 50 %") == "Zürich, 日本/é.png 🙂 50 %"
    assert harmless("2 mistakes:\n  one\n  two\nfreqdoor: all is well") == (
        r"2 mistakes:" + "\n  one\n  " + r"two\nfreqdoor: all is well"
    )


@pytest.fixture
def at_a_terminal(monkeypatch):
    """Both consoles as a terminal has them."""
    for console in (terminal.console, terminal.errors):
        monkeypatch.setattr(console, "_force_terminal", True)


def test_nothing_hostile_goes_out_whatever_way_it_takes(at_a_terminal, capfd):
    table = Table("photo", title=HOSTILE)
    table.add_row(HOSTILE)
    terminal.console.print(table)
    say(HOSTILE)
    say_page(f"| {HOSTILE} |\n|---|\n")
    note(HOSTILE)
    warn(UserWarning(HOSTILE))
    show_trace(ValueError(HOSTILE))
    with live(2, HOSTILE) as show:
        show(1, {"loss": 0.5})
    with pytest.raises(SystemExit):
        terminal.fail(HOSTILE)
    out, err = capfd.readouterr()
    for text in (out, err):
        assert not {"\x07", "\x9b", "\u202e", "\u2066", "\udcff", "\x00", "\u2028"} & set(text)
        assert "\x1b[2J" not in text
        assert "\x1b]" not in text
    assert err.count(SHOWN) == 3  # a warning, a trace and a sentence; what is noted is broken into lines
    assert f"{SHOWN}\n| {SHOWN} |\n|---|\n" in out


@pytest.mark.parametrize("words", [("compress", "a", "b", HOSTILE), (HOSTILE,), (f"--{HOSTILE}",)])
def test_a_wrong_command_line_is_repeated_harmlessly(words, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as end:
        app(args=list(words))
    assert end.value.code == 2
    err = capfd.readouterr().err
    assert not {"\x1b", "\x9b", "\u202e", "\udcff"} & set(err)
    assert r"a\x1b" in err  # the rest may be on the next line


def test_a_defect_is_one_sentence_with_its_trace(capfd, monkeypatch):
    def defect(**_):
        raise KeyError(HOSTILE)

    monkeypatch.setattr(cli, "app", defect)
    monkeypatch.setattr(sys, "argv", ["freqdoor", "report"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    err = capfd.readouterr().err
    assert end.value.code == 2
    assert err.count("freqdoor: ") == 1
    assert "KeyError" in err
    assert "Traceback" in err
    assert "\x1b" not in err
