"""One process a folder: who holds it is named, and what a crash leaves holds nothing."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from freqdoor import lock
from freqdoor.errors import FreqdoorError
from freqdoor.lock import LOCK, alone, check_folder, holding

HELD = r"run: freqdoor plant holds this folder \(process {pid} on \S+ since \d\d:\d\d\); wait for it or choose another"


def test_a_second_process_says_who_holds_the_folder_and_a_crash_lets_go(tmp_path):
    code = "from freqdoor.lock import holding\nwith holding('run', 'plant'): print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FreqdoorError, match=HELD.format(pid=process.pid)), holding(tmp_path / "run", "evaluate"):
            pass
        assert json.loads((tmp_path / "run" / LOCK).read_text())["verb"] == "plant"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "run" / LOCK).exists()
    with holding(tmp_path / "run", "evaluate"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("left", ["", "a file"])
def test_a_folder_is_waited_for_and_made_again_where_its_holder_has_removed_it(tmp_path, monkeypatch, left):
    held, looked = threading.Event(), threading.Event()

    def other() -> None:
        with holding(tmp_path / "run", "plant"):
            held.set()
            assert looked.wait(60)
            if left:
                (tmp_path / "run/file").write_text(left)

    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(60)
    monkeypatch.setattr(lock, "WAIT", 0)
    monkeypatch.setattr(lock, "_locked", lambda *a, real=lock._locked: (real(*a), looked.set())[0])
    with holding(tmp_path / "run", "reproduce", wait=True):
        thread.join()
        assert json.loads((tmp_path / "run" / LOCK).read_text())["verb"] == "reproduce"
        assert (tmp_path / "run/file").exists() == bool(left)


def test_one_thread_may_hold_a_folder_again_and_another_may_not(tmp_path):
    refused = []

    def other() -> None:
        try:
            with holding(tmp_path / "run", "evaluate"):
                pass
        except FreqdoorError as error:
            refused.append(str(error))

    with holding(tmp_path / "run", "plant"):
        with holding(tmp_path / "run/../run", "evaluate"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert re.search(HELD.format(pid=os.getpid()), refused[0])
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(refused) == 1


def test_a_forked_child_holds_nothing_for_its_parent(tmp_path):
    read, write = os.pipe()
    with holding(tmp_path, "plant"):
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
    try:
        with holding(tmp_path, "evaluate"):
            pass
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)


def test_who_waited_with_the_removed_file_does_not_hold_the_folder(tmp_path):
    """Between its opening and its locking the holder before has removed the file, and a third one has made another."""
    stale = lock._opened(tmp_path)
    (tmp_path / LOCK).unlink()
    with holding(tmp_path, "plant"), stale:
        assert not lock._locked(stale, tmp_path)
    with lock._opened(tmp_path) as stale:
        (tmp_path / LOCK).unlink()
        assert lock._locked(stale, tmp_path)
        assert os.path.samestat(os.fstat(stale.fileno()), os.stat(tmp_path / LOCK))


def test_folders_that_were_made_for_nothing_go_again(tmp_path):
    with holding(tmp_path / "a/b", "plant"):
        assert (tmp_path / "a/b").is_dir()
    assert not (tmp_path / "a").exists()
    with holding(tmp_path / "a/b", "plant"):
        (tmp_path / "a/b/file").touch()
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["file"]


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for act in (check_folder, lambda folder: holding(folder, "plant").__enter__()):
        with pytest.raises(FreqdoorError, match=r"file/deeper: could not write \(.*file is no folder\)"):
            act(tmp_path / "file/deeper")
    check_folder(tmp_path / "new/deeper")
    assert not (tmp_path / "new").exists()
    (tmp_path / LOCK).mkdir()
    with pytest.raises(FreqdoorError, match="could not write"), holding(tmp_path, "plant"):
        pass
    (tmp_path / LOCK).rmdir()
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(FreqdoorError, match="could not write"), holding(tmp_path, "plant"):
        pass
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FreqdoorError, match="no permission"):
        check_folder(tmp_path)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="this file system has no locks"), holding(tmp_path, "plant"):
        pass


def test_a_function_holds_its_out(tmp_path):
    @alone("plant")
    def act(out, *, other=1):
        assert (out / LOCK).exists()
        return other

    assert act(tmp_path, other=2) == act(out=tmp_path, other=2) == 2
    assert not (tmp_path / LOCK).exists()
