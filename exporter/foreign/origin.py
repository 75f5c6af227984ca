"""What is exported: a checkpoint of safetensors as it is, or what a checkpoint of another format becomes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from exporter.foreign.made import MadeTensors
from exporter.foreign.rounding import RoundingErrors
from plans.checkpoint.units import Checkpoint

Say = Callable[[str], None]
"""Told one sentence for a person."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A checkpoint with what the export needs beside it."""

    checkpoint: Checkpoint
    directory: Path
    """Where its files lie."""
    made: MadeTensors | None = None
    """Tensors that are not stored but made."""
    small_files: Callable[[Say], Mapping[str, bytes]] = lambda _warn: {}
    """Makes the root files that are written instead of the folder's."""
    stored: Checkpoint | None = None
    """The checkpoint as it is stored, where it becomes another."""
    is_single_file: bool = False
    """Whether nothing else in the folder belongs to the model."""
    left_out: frozenset[str] = frozenset()
    """Root files that say something else of it."""
    errors: RoundingErrors = field(default_factory=RoundingErrors)
    """Filled while tensors are made."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Folders and files that are read."""
        files = tuple(self.directory / shard.name for shard in self.checkpoint.shards)
        return files if self.is_single_file else (self.directory, *files)
