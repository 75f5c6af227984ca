"""Plan + checkpoint -> an export: one safetensors file per stage in a folder that is itself a checkpoint."""

from exporter.verify import Verified, verify
from exporter.write import export

__all__ = ["Verified", "export", "verify"]
