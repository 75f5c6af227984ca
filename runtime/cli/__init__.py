"""The command `llamarun`."""

from runtime.cli.main import main, run

__all__ = ["main", "run"]
