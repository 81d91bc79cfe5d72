"""Experiments as data: tables of rows to run with published values beside them, one runner, one page."""
