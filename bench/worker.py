"""The process behind ``isolation.Worker``: ``python -m bench.worker DESCRIPTOR STARTED``.

It runs the jobs that arrive on a pipe and ends with the pipe, or with the first job that fails.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler

from .isolation import DONE, FAILED, RESULT, STARTED


def main(descriptor: int, started: float) -> int:
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    pipe = Connection(descriptor)
    while True:
        try:
            job = pipe.recv_bytes()
        except (EOFError, OSError):
            return 0  # the parent has ended
        try:
            # Unpickling the first job imports what it needs. The clock is the parent's too.
            run = ForkingPickler.loads(job)
            pipe.send((STARTED, time.monotonic() - started))
            run(lambda value: pipe.send((RESULT, value)))
            pipe.send((DONE, None))
        except BaseException as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines()
            with contextlib.suppress(OSError):  # the parent has ended
                pipe.send((FAILED, ": ".join([type(error).__name__, *lines[:1]])))
            return 1


if __name__ == "__main__":
    status = main(int(sys.argv[1]), float(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a lost CUDA context can make an orderly exit hang
