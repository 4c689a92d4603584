"""Runs a scheduler and its workers as child processes of ``aptserve up``."""
