"""The ``aptserve`` command.

Only the standard library is imported here, so that an installation without the ``cli`` extra
answers with one line that helps.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

_LIBRARIES = ("typer", "rich", "grpc_health")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done. 1: it failed. 2: wrong usage or a missing package. 130: interrupted.
    """
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        print(
            f"aptserve: the command line needs {', '.join(missing)}: pip install 'apt-serve[cli]'",
            file=sys.stderr,
        )
        return 2
    # gRPC's own log lines say nothing that our one-line errors do not.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from aptserve.cli.app import run

    return run(sys.argv[1:] if arguments is None else arguments)
