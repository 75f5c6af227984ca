"""A plan in the words of other engines."""

from exporter.emit.write import Emission, emit

__all__ = ["Emission", "emit"]
