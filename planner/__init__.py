"""Checkpoint -> profile, machine -> cluster, and the best plan for both, proved.

`analyze_model` and `solve_model` are imported on first use, so that the command line starts without a solver.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.api import analyze_model, solve_model

__all__ = ["analyze_model", "solve_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from planner import api

        return getattr(api, name)
    raise AttributeError(f"module 'planner' has no attribute '{name}'")
