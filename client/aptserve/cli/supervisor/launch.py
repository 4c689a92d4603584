"""Runs a module as ``python -m`` does, and ends with the supervisor however that one ends.

The supervisor holds the other end of standard input and never writes to it. End of file means that
it is gone, killed outright or not, on every system and without a race at start.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

GRACE_SECONDS = 5.0
"""From the supervisor's end, SIGTERM, to the hard exit of a child that does not stop."""


def main() -> None:
    """Run the module named by the first argument with the remaining ones."""
    lifeline = os.dup(0)  # not inherited by processes that the module starts
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)
    threading.Thread(target=_end_with, args=(lifeline,), name="lifeline", daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _end_with(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
