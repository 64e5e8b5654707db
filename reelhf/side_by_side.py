"""Independent jobs, several at a time, each in a process of its own.

Small models leave most of a machine idle: on two cores, two of them on one thread each do in 10 minutes what takes 13 one after the
other on both. The jobs must not talk to each other; what one returns is sent back by pickle.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from reelhf.errors import UserError

T = TypeVar("T")
Job = Callable[[], Any]
"""A picklable call without arguments: `functools.partial` of a function of a module."""


_POLL_SECONDS = 0.5
_NICE = 10
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_stop = threading.Event()  # set while work in the background is not wanted any more


def run_jobs(jobs: Mapping[str, Job], *, at_once: int) -> dict[str, Any]:
    """What each job returns, by name.

    Args:
        jobs: started in this order; put the longest first, the others give way to it.
        at_once: how many run at a time. 1 runs them here, one after the other; from 2 on each gets a process of its own and an
            equal share of this process's threads, so that the outcome does not depend on how many there are to share with.
    Raises: UserError as a job raised it, or for several processes that would each start them; RuntimeError naming the job for
        anything else. The other jobs are stopped then.
    """
    if at_once == 1:
        return {name: job() for name, job in jobs.items()}
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        raise UserError(
            f"side_by_side is {at_once} in each of {launched} processes; expected 1 where a launcher starts several: set "
            "side_by_side=1, or run one process"
        )
    threads = max(1, _num_threads() // at_once)
    waiting, running, results = list(jobs.items()), list[_Running](), dict[str, Any]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                gives_way = len(waiting) < len(jobs)
                running.append(_start(*waiting.pop(0), threads, gives_way))
            ready = wait([one.answers for one in running], timeout=_POLL_SECONDS)
            if _stop.is_set():
                raise RuntimeError("stopped, because what it ran beside failed")
            for one in [one for one in running if one.answers in ready]:
                results[one.name] = one.result()
                running.remove(one)
    finally:
        for one in running:
            one.process.kill()
            one.process.join()
    return {name: results[name] for name in jobs}


@contextlib.contextmanager
def in_background(work: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """`work` goes on while the block does; what the block is given returns its result, and waits for it.

    The work is to be done by `run_jobs` in other processes: this one keeps one of its threads, and a block that fails stops them.
    """
    import torch

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, thread_name_prefix="background") as pool:
        future = pool.submit(work)
        torch.set_num_threads(1)  # two threads each would wait for one another
        try:
            yield future.result
        except BaseException:
            _stop.set()
            raise
        finally:
            pool.shutdown()
            _stop.clear()
            torch.set_num_threads(threads)


@dataclass
class _Running:
    name: str
    process: BaseProcess
    answers: Connection

    def result(self) -> Any:
        """Waits for the process to end."""
        try:
            outcome, value = self.answers.recv()
        except EOFError:
            outcome, value = "died", None
        self.process.join()
        if outcome == "returned":
            return value
        if outcome == "bad input":
            raise UserError(value)
        if outcome == "raised":
            last = value.strip().splitlines()[-1]
            raise RuntimeError(f"{self.name}: {last}\nin its own process:\n{value}")
        raise RuntimeError(
            f"the process of {self.name} ended with exit code {self.process.exitcode} and no answer; "
            "was it out of memory? Run fewer side by side"
        )


def _start(name: str, job: Job, threads: int, gives_way: bool) -> _Running:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    arguments = job, sender, threads, gives_way
    process = context.Process(target=_work, args=arguments, name=name, daemon=True)
    process.start()
    sender.close()  # the child's is the only one left: its death ends the pipe
    return _Running(name, process, receiver)


def _work(job: Job, answers: Connection, threads: int, gives_way: bool) -> None:
    """Runs in the child."""
    import torch

    from reelhf.progress import use_plain_lines

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its children itself
    threading.Thread(target=_die_with_parent, daemon=True).start()
    for variable in _LAUNCHER:  # of the parent, whose process group this one is not in
        os.environ.pop(variable, None)
    if gives_way:
        os.nice(_NICE)
    torch.set_num_threads(threads)
    use_plain_lines()
    try:
        answer = ("returned", job())
    except UserError as error:
        answer = ("bad input", str(error))
    except BaseException:
        answer = ("raised", traceback.format_exc())
    sys.stdout.flush()
    answers.send(answer)
    answers.close()


def _die_with_parent() -> None:
    """A killed parent cannot stop its children, and two writers in one folder are worse than none."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()
