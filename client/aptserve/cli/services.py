"""The two services, run in this process with settings from flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aptserve.cli.problems import EXIT_USAGE, CommandError, settings_from_flags

_RENAMED = {
    "ttft_objective_seconds": "--ttft",
    "tbt_objective_seconds": "--tbt",
    "num_threads": "--threads",
    "api_key": "APTSERVE_SCHEDULER_API_KEY",
    "join_token": "the join token",
}


def load_scheduler_settings(flags: Mapping[str, object]) -> Any:
    """``SchedulerSettings`` of flags, environment and defaults."""
    try:
        from aptserve_scheduler.config import ConfigError, load_settings
    except ModuleNotFoundError as error:
        raise _not_installed("scheduler", error) from error
    return settings_from_flags(load_settings, ConfigError, flags, _RENAMED)


def load_worker_settings(flags: Mapping[str, object]) -> Any:
    """``WorkerSettings`` of flags, environment and defaults."""
    try:
        from aptserve_worker.config import SettingsError, load_settings
    except ModuleNotFoundError as error:
        raise _not_installed("worker", error) from error
    return settings_from_flags(load_settings, SettingsError, flags, _RENAMED)


def run_scheduler(flags: Mapping[str, object]) -> int:
    """Run the scheduler service until a signal; its exit code."""
    settings = load_scheduler_settings(flags)
    from aptserve_scheduler.service import run

    return run(settings)


def run_worker(flags: Mapping[str, object]) -> int:
    """Run one worker until a signal; its exit code."""
    settings = load_worker_settings(flags)
    from aptserve_worker.main import main

    return main(settings)


def _not_installed(extra: str, error: ModuleNotFoundError) -> CommandError:
    return CommandError(
        f"{error.name} is not installed: pip install 'apt-serve[{extra}]'", EXIT_USAGE
    )
