"""``aptserve demo``: the same burst of requests under two policies, side by side on a screen."""
