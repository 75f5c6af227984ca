"""Bundles -> tokens: stages, chain, generation. `load` is imported on first use, and torch with it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.session import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from runtime import session

        return getattr(session, name)
    raise AttributeError(f"module 'runtime' has no attribute '{name}'")
