"""``python -m aptserve_worker``: a worker whose settings come from the environment."""

from __future__ import annotations

import os
import sys


def _run() -> int:
    if len(sys.argv) > 1:
        print(
            "error: settings come from APTSERVE_WORKER_*; for flags use: aptserve worker",
            file=sys.stderr,
        )
        return 2
    # Read when grpc is imported; without it, lines of gRPC's own break into the structured log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from aptserve_worker.config import SettingsError, load_settings
    from aptserve_worker.main import main

    try:
        settings = load_settings()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return main(settings)


if __name__ == "__main__":
    sys.exit(_run())
