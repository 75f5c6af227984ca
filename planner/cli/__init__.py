"""The command `llamaplan`."""

from planner.cli.main import main, run

__all__ = ["main", "run"]
