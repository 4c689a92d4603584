"""``python -m aptserve_scheduler``: the service with its settings from the environment."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run until a signal; 2 for wrong settings."""
    # Read when grpc is imported; without it, lines of gRPC's own break into the structured log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from aptserve_scheduler.config import ConfigError, load_settings
    from aptserve_scheduler.service import run

    try:
        settings = load_settings()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
