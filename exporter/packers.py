"""Which packer an export needs: none, one that rounds to nearest, or one that calibrates on a text first."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.binding import Say
from exporter.calibrate.rounder import CalibratedRounder
from exporter.calibrate.text import FEW_TOKENS, Text, read_text
from exporter.disk.staging import Staging
from exporter.job import Progress, Workers
from exporter.layout import Layout
from exporter.packing.nearest import NearestRounder
from exporter.packing.packer import Packer, Squares
from exporter.packing.scratch import Scratch
from exporter.sources import Sources
from plans.checkpoint.units import Checkpoint, require_full
from plans.dtypes import STORED_DTYPES
from plans.errors import UsageError
from plans.packed.choice import WeightChoice
from plans.packed.scheme import PACKED, SCALE

if TYPE_CHECKING:
    from plans.export.manifest import CalibrationText


@dataclass(frozen=True, slots=True)
class Packing:
    """How the weights of an export are packed."""

    checkpoint: Checkpoint
    layout: Layout
    scale: str
    """Stored dtype of the scales."""
    text: Text | None
    num_threads: int
    progress: Progress

    @property
    def record(self) -> "CalibrationText | None":
        """What the manifest says about the text."""
        return None if self.text is None else self.text.record

    @contextmanager
    def packer(self, staging: Staging, sources: Sources, workers: Workers) -> Iterator[Packer | None]:
        """Give what packs weights while the stages' files are written; None where none are packed."""
        if not self.layout.schemes:
            yield None
            return
        nearest = NearestRounder(sources, workers.packing, self.num_threads, self.scale)
        with Scratch.of(staging) as scales, Scratch.of(staging) as kept:
            if self.text is None:
                yield Packer(nearest, scales)
            else:
                yield Packer(CalibratedRounder(self._calibrate, kept, self._kept_bytes(), nearest), scales)

    def _calibrate(self, kept: Scratch) -> Mapping[str, Squares]:
        import torch

        from exporter.calibrate.calibrate import Target, calibrate_layers

        assert self.text is not None
        scale: torch.dtype = getattr(torch, STORED_DTYPES[self.scale].torch)
        target = Target(self.layout.schemes, scale, kept, {})
        calibrate_layers(self.checkpoint, target, text=self.text, num_threads=self.num_threads, progress=self.progress)
        return target.squares

    def _kept_bytes(self) -> int:
        pieces = (piece for stage in self.layout.stages for piece in stage.pieces)
        return sum(p.size_bytes for p in pieces if p.scheme is not None and p.part in (PACKED, SCALE))


def calibration_text(
    path: Path | None, *, choice: WeightChoice | None, checkpoint: Checkpoint, warn: Say
) -> Text | None:
    """Read the text that packed weights are calibrated on; None where none is given.

    Raises:
        UsageError: a text, and nothing to calibrate, or experts.
        InputError, MachineError: as `exporter.calibrate.text.read_text`.
    """
    if path is None:
        return None
    if choice is None:
        raise UsageError(
            "--calibration-text belongs to packed weights, and the plan keeps them as they are",
            hint="solve with --weights int4 or int8",
        )
    config = checkpoint.config
    if config.num_experts:
        raise UsageError(
            "--calibration-text: each expert reads other tokens, and experts are rounded to nearest alone",
            where=checkpoint.path,
            hint="leave it out",
        )
    text = read_text(
        path,
        folder=require_full(checkpoint),
        vocab_size=config.vocab_size,
        context_tokens=config.max_position_embeddings,
    )
    if text.record.num_tokens < FEW_TOKENS:
        warn(f"{path} has {text.record.num_tokens} tokens to calibrate on; from {FEW_TOKENS} on they help for certain")
    return text
