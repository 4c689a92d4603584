"""Wrong use of ``aptserve demo``."""

import pytest
from support.commands import Cli


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--policy", "best"], "aptserve: --policy 'best': must be one of apt, "),
        (["--seconds", "1"], "aptserve demo: Invalid value for --seconds: must be in [5, 600]"),
        (["--seconds", "soon"], "aptserve demo: Invalid value for '--seconds': 'soon' is no"),
        (["--seed", "-1"], "aptserve demo: Invalid value for '--seed'"),
    ],
)
def test_wrong_use(cli: Cli, arguments: list[str], line: str) -> None:
    outcome = cli("demo", *arguments)
    assert outcome.code == 2
    assert outcome.error_line.startswith(line)
    assert outcome.out == ""
