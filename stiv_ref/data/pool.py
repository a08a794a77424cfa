"""Independent jobs in worker processes, one of which may crash without taking the others with it."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")
ErrorT = TypeVar("ErrorT", bound=Exception)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_jobs(
    work: Callable[[JobT], ResultT], jobs: Sequence[JobT], workers: int, *, expected: type[ErrorT]
) -> Iterator[tuple[JobT, ResultT | ErrorT]]:
    """Yield each job with its result, or with the ``expected`` error that it raised, as they come in.

    More than one worker are processes, so that ``work`` and the jobs must be picklable. A job that kills its process
    (a decoder's crash, no memory) counts as an ``expected`` error. Any other error ends it all; so do Ctrl-C and
    closing the generator, which leave no process behind.
    """
    if workers < 2 or len(jobs) < 2:
        yield from ((job, _attempt(work, job, expected)) for job in jobs)
        return
    suspects: list[JobT] = []
    left = list(jobs)
    while left:
        yield from _run_until_crash(work, left, min(workers, len(left)), expected, suspects)
        for job in suspects:  # alone, the one that crashes is known
            alone: list[JobT] = []
            yield from _run_until_crash(work, [job], 1, expected, alone)
            if alone:
                yield job, expected(f"{job}: its worker process crashed (a broken file, or too little memory)")
        suspects.clear()


def _attempt(work: Callable[[JobT], ResultT], job: JobT, expected: type[ErrorT]) -> ResultT | ErrorT:
    try:
        return work(job)
    except expected as error:
        return error


def _run_until_crash(
    work: Callable[[JobT], ResultT], left: list[JobT], workers: int, expected: type[ErrorT], suspects: list[JobT]
) -> Iterator[tuple[JobT, ResultT | ErrorT]]:
    """Take jobs from ``left`` until it is empty or a process dies; the jobs it then worked on go to ``suspects``."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the threads that draw the progress
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=ignore_signals)
    running: dict[Future[ResultT | ErrorT], JobT] = {}
    try:
        while left or running:
            while left and len(running) < workers:
                with signals_held():
                    running[pool.submit(_attempt, work, left[0], expected)] = left[0]
                left.pop(0)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield running.pop(future), result
    except BrokenProcessPool:
        suspects.extend(running.values())
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back while processes start: they begin so too, until :func:`ignore_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(_worker: int = 0) -> None:
    """Leave Ctrl-C and SIGTERM to the parent: they reach the whole group of processes, and it decides what they mean.

    So a worker that shall end at once must be killed.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
