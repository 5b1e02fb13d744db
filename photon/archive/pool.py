"""Work in processes that may die: out of memory, a segmentation fault, a hang. The work of the others goes on.

for task, result in in_processes(make_job, arguments, tasks, workers=8, timeout=600):
    ...                                    # in the order of completion; a `Death` for a task that killed its worker
"""

import contextlib
import multiprocessing
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait

LOADED_ONCE = ["__main__", "photon.archive.reading"]  # before workers are forked, which then share them


@dataclass(frozen=True)
class Death:
    """How a worker ended: "killed by signal 9 (SIGKILL: often out of memory)", "exit code 1", "no answer in 600 s"."""

    reason: str


@dataclass
class _Worker:
    process: object
    pipe: object
    task: object = None
    since: float = 0.0


def in_processes(make_job, arguments, tasks, workers, timeout=None):
    """Yields (task, result) or (task, `Death`) as they come.

    Args:
        make_job: function of a module; `make_job(*arguments)` gives each worker its job, `job(task)` the result.
        tasks: any iterable, not of `None`; the next one is taken when a worker is free, so that memory stays flat.
        workers: number of processes. timeout: seconds for one task, after which its worker is killed.
    Raises: what a job raises ends all.
    """
    context = multiprocessing.get_context("spawn" if sys.platform in ("win32", "darwin") else "forkserver")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(LOADED_ONCE)
    tasks, pool = iter(tasks), []
    upcoming = next(tasks, None)
    try:
        while True:
            while upcoming is not None:
                idle = next((worker for worker in pool if worker.task is None), None)
                if idle is None and len(pool) == workers:
                    break
                if idle is None:
                    idle = _start(context, make_job, arguments)
                    pool.append(idle)
                idle.task, idle.since = upcoming, time.monotonic()
                with contextlib.suppress(BrokenPipeError):  # it died meanwhile: found when its answer is awaited
                    idle.pipe.send((upcoming,))
                upcoming = next(tasks, None)
            busy = [worker for worker in pool if worker.task is not None]
            if not busy:
                return
            ready = wait([worker.pipe for worker in busy], timeout=1.0 if timeout else None)
            for worker in busy:
                if worker.pipe in ready:
                    task, worker.task = worker.task, None
                    try:
                        done, result = worker.pipe.recv()
                    except (EOFError, OSError):  # the end of the process, between messages or within one
                        pool.remove(worker)
                        yield task, Death(_end_of(worker.process))
                        continue
                    if not done:
                        raise result
                    yield task, result
                elif timeout and time.monotonic() - worker.since > timeout:
                    pool.remove(worker)
                    worker.process.kill()
                    worker.process.join()
                    yield worker.task, Death(f"no answer in {timeout:g} s")
    finally:
        for worker in pool:
            if worker.task is None:
                with contextlib.suppress(OSError):
                    worker.pipe.send(None)
            else:
                worker.process.terminate()
            worker.pipe.close()
        for worker in pool:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()


def _start(context, make_job, arguments):
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, make_job, arguments), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return _Worker(process, ours)


def _work(pipe, make_job, arguments):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    try:
        job = make_job(*arguments)
        while (given := pipe.recv()) is not None:
            pipe.send((True, job(*given)))
    except EOFError:  # the process that started this one has ended
        return
    except (OSError, ImportError, ValueError, TypeError) as error:
        pipe.send((False, error))


def _end_of(process):
    process.join()
    if process.exitcode >= 0:
        return f"exit code {process.exitcode}"
    name = signal.Signals(-process.exitcode).name
    often = {"SIGKILL": ": often out of memory", "SIGSEGV": ": a fault in a library"}.get(name, "")
    return f"killed by signal {-process.exitcode} ({name}{often})"
