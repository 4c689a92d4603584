"""``aptserve simulate``: from what was typed to runs, tables and files."""
