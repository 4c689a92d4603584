"""Makes ``tests/support`` importable from every test folder, and Triton run without a GPU."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# The interpreter is chosen when a kernel is imported, whichever test does so first.
os.environ["TRITON_INTERPRET"] = "1"
