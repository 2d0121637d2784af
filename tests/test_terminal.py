"""What a log hears while a verb works, and how a verb ends when it is stopped from outside."""

import os
import pickle
import re
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
from freqdoor.notes import Count

pytestmark = pytest.mark.whole

FLEET = Path(__file__).parent.parent / "configs/fleet/bundled.toml"
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


def test_a_log_hears_how_many_pieces_are_done_and_how_long_the_rest_takes(monkeypatch, capsys):
    """Measured from the first piece on, so that those of an earlier process do not count."""
    clock = iter([*[0.0] * 2, *[90.0] * 20])
    monkeypatch.setattr(terminal, "MINUTE", 0.2)
    with every_minute("evaluate"):
        monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
        note(Count("5.png", 4, 24))
        note("5.png: tampered, bpp")
        time.sleep(0.3)
        note(Count("8.png", 7, 24))
        time.sleep(0.2)
        monkeypatch.undo()
        note(Count("last.png", 24, 24))
        note("writing the report")
    lines = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "5.png: tampered, bpp (4 of 24)"
    assert lines[1] == f"8.png (7 of 24), about {round(17 * 30 / 0.2)} min left"


def test_pieces_have_a_bar_at_a_terminal_and_lines_do_not_pile_up(at_a_terminal, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with every_minute("evaluate"):
        for number, name in enumerate(("a.png", "b.png")):
            note(Count(name, number, 2))
            note(f"{name}: vanilla")
            note(f"{name}: tampered")
        with live(2, "planting") as show:  # beside the other bar, and gone before it
            show(1, {"loss": 0.5})
        note(Count("b.png", 2, 2))
        note("writing")
        say("done")
    out, err = capfd.readouterr()
    last = re.split(r"\x1b\[\d?K|\r", err)[-1]
    assert "2/2" in last
    assert "writing" in last
    assert "planting" not in last
    assert "vanilla\n" not in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", err)  # it stood beside the bar
    assert out == "done\n"  # a program that reads the answer finds no bar


def test_ctrl_c_says_how_far_it_was_and_what_is_kept(monkeypatch, capsys):
    def stop_at_the_third(note):
        note(Count("c.png", 2, 9))
        raise KeyboardInterrupt

    for name, sentence in (
        ("audit", "nothing is kept, the same command begins anew"),
        ("evaluate", "what is measured so far is kept, and the same command goes on after it"),
        ("fleet", "the members that are made are kept, and the same command makes the others"),
        ("protect", "the photos that are done stay in the folder, and the same command does all of them"),
    ):
        monkeypatch.setattr(f"freqdoor.{name}", lambda *_, note, **__: stop_at_the_third(note), raising=False)
        words = {"evaluate": ["x", "--images", "y"], "fleet": [str(FLEET)]}.get(name, ["x"])
        with pytest.raises(SystemExit) as end:
            app([name, *words, "--out", "z"], standalone_mode=False)
        assert end.value.code == 130
        assert capsys.readouterr().err.strip() == f"freqdoor: stopped with 2 of 9 done; {sentence}"


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
    kept = "the steps so far are kept, and the same command goes on after them"
    assert (process.returncode, err.strip()) == (code, f"freqdoor: stopped; {kept}")
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


def test_a_line_that_counts_reaches_another_process_whole():
    line = pickle.loads(pickle.dumps(Count("kodim05.png", 4, 24)))
    assert (line, line.what, line.done, line.total) == ("kodim05.png (4 of 24)", "kodim05.png", 4, 24)
