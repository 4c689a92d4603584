"""``python -m aptserve_scheduler``: the service with its settings from the environment."""

from __future__ import annotations

import sys

from aptserve_scheduler.config import ConfigError, load_settings
from aptserve_scheduler.service import run


def main() -> int:
    """Run until a signal; 2 for wrong settings."""
    try:
        settings = load_settings()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
