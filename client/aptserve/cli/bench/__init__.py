"""Plays a trace against a running service, as its clients would, and notes what they saw."""

from aptserve.cli.bench.play import LiveRun, play_trace

__all__ = ["LiveRun", "play_trace"]
