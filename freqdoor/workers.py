"""Where the jobs of a sweep run: in processes of this machine, or on a Ray cluster; what they give is the same."""

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

from freqdoor.errors import FreqdoorError
from freqdoor.limits import allowed_memory, max_memory
from freqdoor.training.precision import flush_denormals
from freqdoor.types import check_choice

Runner = Literal["local", "ray"]
GRACE = 60.0  # seconds that a job has for the end of a step, before a cluster that is ours ends


@contextmanager
def workers(jobs: int, runner: Runner = "local", *, gpu: bool = False) -> Iterator[Executor]:
    """Something to submit jobs to, each of one thread; those under way are ended when an exception leaves the block.

    "ray" takes the cluster that RAY_ADDRESS names or that this program has joined, or begins one on this machine. A job
    whose worker is killed runs again there, so that jobs have to go on from what they find in their folder.

    Args:
        jobs: how many run side by side in this machine's processes, or on the cluster that is begun here.
        gpu: whether a cluster gives each job a GPU of its own, which is the job's only one; processes here share one.

    Raises:
        FreqdoorError: no jobs, an unknown runner, Ray is not installed, its cluster cannot be joined or has no GPU.
    """
    check_workers(jobs, runner)
    with _processes(jobs) if runner == "local" else _ray(jobs, gpu) as pool:
        yield pool


@contextmanager
def other_workers(jobs: int, runner: Runner = "local") -> Iterator[Executor | None]:
    """`workers`, or None where one job at a time is asked of this machine: the caller itself does it then."""
    if jobs == 1 and runner == "local":
        yield None
        return
    with workers(jobs, runner) as pool:
        yield pool


def check_workers(jobs: int, runner: str) -> None:
    """Raise if there are no such workers."""
    check_choice("runner", runner, Runner)
    if jobs < 1:
        raise FreqdoorError(f"jobs: expected 1 or more, found {jobs}")


@contextmanager
def _processes(jobs: int) -> Iterator[Executor]:
    settle = partial(_on_one_thread, os.getcwd())  # processes begin where the caller began, which may be elsewhere
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=settle) as pool:
        try:
            yield pool
        except BaseException:
            running = list((pool._processes or {}).values())  # which a shutdown forgets
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()  # a training saves its state
            raise


@contextmanager
def _ray(jobs: int, gpu: bool) -> Iterator[Executor]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
    except ImportError:
        raise FreqdoorError(
            "runner 'ray': expected the package ray, found none; install it with pip install 'freqdoor[ray]'"
        ) from None
    joined = ray.is_initialized()
    if not joined:
        alone = {"num_cpus": jobs, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}  # which nobody reaches
        try:
            ray.init(log_to_driver=False, logging_level="error", **({} if os.environ.get("RAY_ADDRESS") else alone))
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise FreqdoorError(f"runner 'ray': could not join or begin a cluster ({reason})") from None
    try:
        if gpu and not ray.cluster_resources().get("GPU"):
            raise FreqdoorError("runner 'ray': expected a cluster with a GPU for every job, found none; set device=cpu")
        pool = _RayExecutor(ray, gpu)
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    finally:
        if not joined:
            ray.shutdown()


class _RayExecutor(Executor):
    """Ray's tasks as `concurrent.futures` has them."""

    def __init__(self, ray: Any, gpu: bool) -> None:
        self._ray = ray

        def run(places: list[str], *job: Any) -> tuple[Any, Exception | None]:  # sent as code, not by its name
            sys.path[:0] = [place for place in places if place not in sys.path]  # where the caller has its modules
            from freqdoor.workers import _run

            return _run(*job)

        self._task = ray.remote(num_cpus=1, num_gpus=int(gpu))(run)
        self._running: dict[Future[Any], Any] = {}

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Let the cluster call the function once; its exceptions come as they were raised."""
        call = pickle.dumps((function, arguments, options))
        reference = self._task.remote(sys.path, str(Path.cwd()), allowed_memory(), call)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self._running[future] = reference
        reference.future().add_done_callback(lambda done: self._settle(future, done))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let what runs end by itself, or as if by Ctrl-C: a training saves its state at the end of its step."""
        references = list(self._running.values())
        for reference in references if cancel_futures else ():
            with contextlib.suppress(ValueError, TypeError):  # it has ended meanwhile
                self._ray.cancel(reference)
        if references:
            self._ray.wait(references, num_returns=len(references), timeout=None if wait else GRACE)

    def _settle(self, future: "Future[Any]", done: "Future[Any]") -> None:
        self._running.pop(future, None)
        error = done.exception()
        if error is not None:  # of Ray's own: that of the job comes as a value
            reason = " ".join(str(error).split())[:160]
            future.set_exception(FreqdoorError(f"runner 'ray': a job was lost ({type(error).__name__}: {reason})"))
            return
        value, raised = done.result()
        future.set_result(value) if raised is None else future.set_exception(raised)


def _run(folder: str, memory: int, call: bytes) -> tuple[Any, Exception | None]:
    """What a worker of a cluster does: a job, in the caller's folder where it is there too."""
    _on_one_thread(folder)
    try:
        function, arguments, options = pickle.loads(call)  # of our own driver, as all that a cluster is sent
        with max_memory(memory):
            return function(*arguments, **options), None
    except Exception as error:
        return None, error


def _on_one_thread(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.chdir(folder)
    torch.set_num_threads(1)
    flush_denormals()
