"""``python -m aptserve.cli`` is ``aptserve``."""

import sys

from aptserve.cli import main

sys.exit(main())
