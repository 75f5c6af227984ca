"""Reads an export back: every byte against the manifest, and every tensor against the model if it is given."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exporter.foreign.opening import find_origin
from exporter.foreign.origin import Origin
from exporter.packing.compare import Module, PackedComparison
from exporter.sources import Sources
from plans.checkpoint.header import TensorEntry
from plans.checkpoint.names import UnitKey, head_name, unit_of
from plans.checkpoint.packed import check_packed
from plans.checkpoint.scales import lost_parts
from plans.checkpoint.units import StoredTensor
from plans.dtypes import STORED_DTYPES
from plans.errors import IntegrityError
from plans.export.manifest import ExportedFile
from plans.export.opening import Bundle, Export, check_unchanged, open_export
from plans.packed.scheme import PACKED, PACKED_PARTS
from plans.packed.tensors import scheme_of_tensor
from plans.reading.digest import BUFFER_BYTES, digest_file, read_into
from plans.reading.files import open_regular, read_limited, sha256_hex

Progress = Callable[[int, int], None]
MAX_SMALL_BYTES = 256 << 20


def _ignore(*_: object) -> None:
    """Take no notice of progress."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What was read back and found right."""

    export_id: str
    stages: tuple[int, ...]
    num_stages: int
    num_files: int
    num_bytes: int
    num_tensors_compared: int
    """With the model's; 0 when no model was given."""
    method: Literal["nearest", "gptq"] | None
    """How packed weights were rounded; None where none are packed."""
    warnings: tuple[str, ...]


def verify(
    directory: Path,
    *,
    model: Path | None = None,
    stage: int | Collection[int] | None = None,
    expect_id: str | None = None,
    progress: Progress = _ignore,
) -> Verified:
    """Read an export back completely.

    Args:
        directory: the export, or the part of it that one host holds.
        model: the checkpoint it was made from, to compare every tensor with.
        stage: zero-based stages that must be here; None for all.
        expect_id: the export id to insist on.
        progress: called with (bytes done, bytes in all).

    Raises:
        IntegrityError: something differs; the message names file, tensor and place.
        InputError, MachineError, UsageError: as `plans.export.opening.open_export`.
    """
    export = open_export(directory, stage=stage, expect_id=expect_id)
    recorded: dict[UnitKey, str] = {(unit.kind, unit.index): unit.shapes_sha256 for unit in export.plan.profile.units}
    origin = find_origin(model, shapes=recorded) if model is not None else None
    sizes = [bundle.info.weights.size for bundle in export.bundles.values()]
    meter = _Meter(progress, sum(sizes) * (2 if origin else 1))
    for bundle in export.bundles.values():
        _check_scales(bundle, export)
        _check_digest(bundle, meter)
    warnings = list(export.warnings)
    num_tensors = 0
    if origin is not None:
        warnings += [*origin.checkpoint.warnings, *_compare_small_files(export, origin)]
        num_tensors = _compare_tensors(export, origin, meter)
    for index in export.bundles:
        check_unchanged(export, stage=index)
    small = [file for file in export.manifest.files if not file.path.endswith(".safetensors")]
    return Verified(
        export_id=export.export_id,
        stages=tuple(export.bundles),
        num_stages=export.num_stages,
        num_files=len(small) + 2 * len(export.bundles) + 1,
        num_bytes=sum(sizes) + sum(file.size for file in small),
        num_tensors_compared=num_tensors,
        method=export.manifest.packing.method if export.manifest.packing is not None else None,
        warnings=tuple(warnings),
    )


@dataclass(slots=True)
class _Meter:
    """Counts bytes towards a total."""

    progress: Progress
    total: int
    done: int = 0

    def take(self, data: memoryview) -> None:
        self.done += len(data)
        self.progress(self.done, self.total)


def _check_digest(bundle: Bundle, meter: _Meter) -> None:
    found = digest_file(bundle.path, take=meter.take)
    recorded: ExportedFile = bundle.info.weights
    for name in ("size", "sha256", "xxh3_128"):
        if getattr(found, name) != getattr(recorded, name):
            raise IntegrityError(
                f"has {name} {getattr(found, name)}, the manifest says {getattr(recorded, name)}",
                where=bundle.path,
                hint="the file is damaged or belongs to another export; copy it again",
                code="E-DAMAGED",
            )


def _compare_small_files(export: Export, origin: Origin) -> list[str]:
    """Small files of the model that are no longer what the export was made from; only worth a warning."""
    directory = origin.directory
    shards = {shard.name for shard in origin.checkpoint.shards}
    changed = []
    for source in export.manifest.source:
        path = directory / source.name
        if source.name in shards or source.name.endswith(".safetensors"):
            continue  # their tensors are compared
        if not path.exists() or sha256_hex(read_limited(path, max_bytes=MAX_SMALL_BYTES)) != source.sha256:
            changed.append(f"{path} is not the one the export was made from")
    return changed


def _compare_tensors(export: Export, origin: Origin, meter: _Meter) -> int:
    count, checkpoint = 0, origin.checkpoint
    with Sources.of_origin(origin) as sources:
        packed = PackedComparison(export.manifest.packing, sources, meter.take) if export.manifest.packing else None
        for bundle in export.bundles.values():
            with open_regular(bundle.path) as fd:
                for name, entry in bundle.header.tensors.items():
                    original = name if packed is None else _unpacked(name)
                    source = _source_of(original, checkpoint.tensors, where=bundle.path)
                    scheme = scheme_of_tensor(export.plan.weights, original, source.entry.shape)
                    if packed is None or scheme is None:
                        _compare_tensor(fd, name, entry, source, sources=sources, meter=meter, where=bundle.path)
                    elif name.endswith(PACKED):
                        packed.compare(Module(name.rpartition(".")[0], scheme, source, fd, bundle.header, bundle.path))
                    count += 1
            if packed is not None:
                packed.check_distances(bundle.path)
        sources.check_unchanged(shards=checkpoint.shards)
    return count


def _source_of(name: str, tensors: Mapping[str, StoredTensor], *, where: Path) -> StoredTensor:
    # A tied head that was cut from its embedding has no tensor of its own in the model.
    found = tensors.get(name) or next((t for n, t in tensors.items() if _is_tied_to(n, name)), None)
    if found is None:
        raise IntegrityError(f"holds {name}, which the model does not have", where=where, code="E-MODEL")
    return found


def _unpacked(name: str) -> str:
    """Return the name of the tensor that a packed one was made of; other names unchanged."""
    module, _, part = name.rpartition(".")
    return f"{module}.weight" if part in PACKED_PARTS else name


def _is_tied_to(embedding: str, head: str) -> bool:
    return unit_of(embedding) == ("embedding", 0) and head_name(embedding) == head


def _check_scales(bundle: Bundle, export: Export) -> None:
    """A quantised weight without its scale is no weight, even if every byte is as it was written."""
    for weight, lost in lost_parts(bundle.header.tensors) if export.config.quantization is not None else ():
        raise IntegrityError(
            f"{weight} is quantised ({bundle.header.tensors[weight].dtype}) and its {lost} is not in the file",
            where=bundle.path,
            hint="an older version left scales of the head out; export again",
            code="E-SCALES",
        )
    if export.config.packing is not None:
        check_packed(bundle.header.tensors, export.config.packing, where=bundle.path)


def _compare_tensor(
    fd: int, name: str, entry: TensorEntry, source: StoredTensor, *, sources: Sources, meter: _Meter, where: Path
) -> None:
    if entry.shape != source.entry.shape:
        raise IntegrityError(
            f"{name} has shape {list(entry.shape)}, in the model {list(source.entry.shape)}",
            where=where,
            code="E-MODEL",
        )
    width, source_width = STORED_DTYPES[entry.dtype].size_bytes, STORED_DTYPES[source.entry.dtype].size_bytes
    step = BUFFER_BYTES // 8
    ours, theirs = memoryview(bytearray(step * width)), memoryview(bytearray(step * source_width))
    for start in range(0, entry.num_elements, step):
        count = min(step, entry.num_elements - start)
        mine, original = ours[: count * width], theirs[: count * source_width]
        read_into(fd, mine, offset=entry.begin + start * width, where=where)
        sources.read(source.file, buffer=original, offset=source.entry.begin + start * source_width)
        if entry.dtype != source.entry.dtype:
            original = _converted(original, source=source.entry.dtype, target=entry.dtype)
        if mine != original:
            place = next(i for i in range(len(mine)) if mine[i] != original[i]) // width
            raise IntegrityError(
                f"{name} differs from the model's at element {start + place} of {entry.num_elements}",
                where=where,
                hint="the export was made from other weights, or one of the two is damaged",
                code="E-MODEL",
            )
        meter.take(mine)


def _converted(data: memoryview, *, source: str, target: str) -> memoryview:
    from exporter.convert import convert_chunk  # imports torch

    return convert_chunk(data, source=source, target=target)
