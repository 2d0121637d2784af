"""Where jobs run: here or on a cluster, they give the same, and raise the same."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import natural, write_png

from freqdoor import FleetSettings, fleet, workers
from freqdoor.errors import FreqdoorError
from freqdoor.settings import make_settings
from freqdoor.workers import workers as open_workers


def once(folder: Path, number: int) -> tuple[int, str]:
    """Kill the worker the first time; say the second time where it is."""
    mark = folder / f"{number}"
    if number == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number, os.getcwd()


def refuse() -> None:
    raise FreqdoorError("photos: expected pictures, found none")


def test_what_there_is_not_is_refused(monkeypatch):
    for given, sentence in (
        ({"jobs": 0}, "jobs: expected 1 or more, found 0"),
        ({"jobs": 1, "runner": "slurm"}, "runner: expected 'local' or 'ray', found 'slurm'"),
    ):
        with pytest.raises(FreqdoorError, match=sentence), open_workers(**given):
            pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FreqdoorError, match=r"found none; install it with pip install 'freqdoor\[ray\]'"):
        open_workers(1, "ray").__enter__()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_cluster_of_two_gives_what_processes_give_though_a_worker_is_killed(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'freqdoor[ray]'")
    monkeypatch.chdir(tmp_path)
    with open_workers(2, "ray") as pool:
        futures = [pool.submit(once, tmp_path, number) for number in range(4)]
        assert [future.result(timeout=120) for future in futures] == [(i, str(tmp_path)) for i in range(4)]
        assert (tmp_path / "1").exists()
        error = pool.submit(refuse).exception(timeout=60)
        if not torch.cuda.is_available():  # a cluster that the program has joined stays
            with pytest.raises(FreqdoorError, match="expected a cluster with a GPU"), open_workers(2, "ray", gpu=True):
                pass
    assert type(error) is FreqdoorError
    assert str(error) == "photos: expected pictures, found none"
    (tmp_path / "photos").mkdir()
    write_png(tmp_path / "photos/a.png", natural(1, 96, 96))
    small = {"steps": 2, "images": {"folder": str(tmp_path / "photos"), "crop": 64, "batch_size": 1}}
    content = {
        "train": small | {"codec": "lite-hyperprior:3", "precision": "fp32"},
        "measured": 1,
        "members": [
            {"name": "tuned", "train": {"seed": 3}},
            {"name": "pruned", "base": "tuned", "alter": {"kind": "prune", "amount": 0.2}},
            {"name": "noisy", "alter": {"kind": "noise", "amount": 0.1}},
        ],
    }
    settings = make_settings(FleetSettings, content)
    made = fleet(settings, "of ray", jobs=2, runner="ray")
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    here = fleet(settings, "of here")
    for a, b in zip(made.members, here.members, strict=True):
        assert a.model_copy(update={"seconds": 0}) == b.model_copy(update={"seconds": 0})
