"""How the worker process ends, for whoever starts it again."""

EXIT_OK = 0
EXIT_BROKEN = 1
"""The engine could not be built, fails again and again, or is stuck: a supervisor may restart."""
EXIT_PERMANENT = 3
"""The model cannot be served or the scheduler refuses it: restarting does not help."""
