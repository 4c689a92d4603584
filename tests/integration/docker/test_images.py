"""The images' install steps, entry points and health checks, run for real."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "check_images.py"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["scheduler"], id="scheduler"),
        # Installing torch anew takes minutes; `make docker-check` does it.
        pytest.param(
            ["worker", "--reuse-packages", "--build-arg", "TORCH_INDEX_URL="], id="worker"
        ),
    ],
)
def test_the_image_installs_serves_and_stops(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, TOOL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout
