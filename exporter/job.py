"""Fills a staging folder: stage files one after another, then the small files, the manifest last."""

import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from exporter.binding import Say
from exporter.disk.staging import Staging
from exporter.disk.syscalls import sync_file
from exporter.layout import Layout, StageLayout
from exporter.packing.packer import Packer
from exporter.packing.record import packing_record
from exporter.root_files import RootFiles
from exporter.sources import Sources
from exporter.stream import Sink, stream_stage
from plans.checkpoint.units import Checkpoint
from plans.export.manifest import (
    MANIFEST_NAME,
    CalibrationText,
    ExportedFile,
    Manifest,
    ManifestStage,
    PackingRecord,
    SourceFile,
    stage_name,
)
from plans.plan import Plan
from plans.reading.digest import FileDigest


@dataclass(frozen=True, slots=True)
class Workers:
    """One thread each but for packing, so that what is given to one pool happens in order."""

    digest: ThreadPoolExecutor
    """Hashes what is written."""
    packing: ThreadPoolExecutor
    """Packs weights; the one with several threads, whose results are taken in order."""
    source: ThreadPoolExecutor
    """Hashes the checkpoint's shards."""
    sync: ThreadPoolExecutor
    """Flushes finished files to disk."""
    stop: threading.Event
    """Set when the export is over, well or not."""


@contextmanager
def start_workers(num_packing: int) -> Iterator[Workers]:
    """Start the threads, so many for packing; on leaving they are told to stop and waited for."""
    digest, source, sync = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("digest", "source", "sync"))
    packing = ThreadPoolExecutor(num_packing, thread_name_prefix="packing")
    workers = Workers(digest, packing, source, sync, threading.Event())
    try:
        yield workers
    finally:
        workers.stop.set()
        packing.shutdown(cancel_futures=True)
        digest.shutdown(cancel_futures=True)
        source.shutdown(cancel_futures=True)
        sync.shutdown()  # every flush owns a descriptor, which it closes even when told to stop


MAX_UNFLUSHED = 8
"""Finished files waiting for the disk; each holds a descriptor."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run: what is written where, and by whom."""

    layout: Layout
    chosen: frozenset[int]
    sources: Sources
    staging: Staging
    workers: Workers
    packer: Packer | None
    """What packs weights; None where the plan leaves them alone."""
    text: CalibrationText | None
    """What it was calibrated on."""
    progress: Progress
    warn: Say
    note: Say

    def run(self, plan: Plan, *, checkpoint: Checkpoint, root: RootFiles) -> Manifest:
        """Fill the staging folder, manifest last, and return the manifest."""
        whole = self._whole_files()
        if whole:
            self.note(
                f"kept {len(whole)} of {len(self.layout.stages)} stage files that an interrupted run had finished"
            )
        self.staging.target.check_space(self._missing_bytes(whole) + root.size_bytes)
        shards = {shard.name: self._hash_source(shard.name) for shard in checkpoint.shards}
        files = [self._entry(stage.name, digest) for stage, digest in self._stages(whole)]
        files += [self._entry(name, self.staging.write(name, data)) for name, data in sorted(root.contents.items())]
        source = (*root.source, *(self._source_file(name, found.result()) for name, found in shards.items()))
        self.sources.check_unchanged(shards=checkpoint.shards)
        packing = packing_record(self.layout, self.packer.squares, text=self.text) if self.packer is not None else None
        manifest = build_manifest(plan, layout=self.layout, files=files, source=source, packing=packing)
        self._write_manifest(manifest)
        return manifest

    def _whole_files(self) -> dict[str, FileDigest]:
        """Finished files of an earlier, killed run; those of stages that are not written count as they are."""
        found = {}
        for stage in self.layout.stages:
            is_written = stage.index in self.chosen
            records = self.staging.journal.records
            record = (
                self.staging.whole(stage.name, size=stage.size_bytes) if is_written else records.get("-" + stage.name)
            )
            if record is not None:
                if self.packer is not None:
                    self.packer.squares.update(record.squares or {})
                found[stage.name] = FileDigest(record.size, record.sha256, record.xxh3_128)
        return found

    def _missing_bytes(self, whole: dict[str, FileDigest]) -> int:
        stages = [stage for stage in self.layout.stages if stage.name not in whole]
        put_aside = max((stage.scale_bytes for stage in stages), default=0)
        put_aside += self.packer.rounder.kept_bytes if self.packer is not None and stages else 0
        return put_aside + sum(stage.size_bytes for stage in stages if stage.index in self.chosen)

    def _stages(self, whole: dict[str, FileDigest]) -> Iterator[tuple[StageLayout, FileDigest]]:
        total = sum(stage.size_bytes for stage in self.layout.stages)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(done, total)

        flushing: list[Future[None]] = []
        for stage in self.layout.stages:
            if stage.name in whole:
                advance(stage.size_bytes)
                yield stage, whole[stage.name]
                continue
            advance(len(stage.header))
            yield stage, self._write_stage(stage, advance, flushing)
        for future in flushing:
            future.result()

    def _write_stage(
        self, stage: StageLayout, advance: Callable[[int], None], flushing: list[Future[None]]
    ) -> FileDigest:
        is_written = stage.index in self.chosen
        fd = self.staging.create(stage.name) if is_written else None
        try:
            sink = Sink(fd, self.staging.shown(stage.name), self.workers.digest)
            if self.packer is not None:
                self.packer.begin_stage()
            digest = stream_stage(stage, sources=self.sources, sink=sink, packer=self.packer, advance=advance)
            self._warn_about_overflows(sink)
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise
        if fd is None:
            self._record("-" + stage.name, digest, stage)
        else:
            flushing.append(self.workers.sync.submit(self._flush, fd, stage, digest))
            if len(flushing) > MAX_UNFLUSHED:
                flushing.pop(0).result()
        return digest

    def _warn_about_overflows(self, sink: Sink) -> None:
        if sink.num_overflows:
            name, count = next(iter(sink.num_overflows.items()))
            others = len(sink.num_overflows) - 1
            more = f", and values of {others} more tensors" if others else ""
            self.warn(f"{count} values of {name}{more} are too large for {self.layout.dtype} and became infinite")

    def _flush(self, fd: int, stage: StageLayout, digest: FileDigest) -> None:
        try:
            if self.workers.stop.is_set():
                return
            sync_file(fd, shown=self.staging.shown(stage.name))
        finally:
            os.close(fd)
        self._record(stage.name, digest, stage)

    def _record(self, name: str, digest: FileDigest, stage: StageLayout) -> None:
        packed = {piece.module for piece in stage.pieces if piece.scheme is not None}
        squares = {module: self.packer.squares[module] for module in packed} if self.packer is not None else None
        self.staging.journal.add(
            name, size=digest.size, sha256=digest.sha256, xxh3_128=digest.xxh3_128, squares=squares
        )

    def _hash_source(self, name: str) -> Future[str]:
        return self.workers.source.submit(self._source_sha256, name)

    def _source_sha256(self, name: str) -> str:
        known = self.staging.journal.records.get("<" + name)
        if known is not None:
            return known.sha256
        found = self.sources.sha256(name, stop=self.workers.stop)
        self.staging.journal.add("<" + name, size=self.sources.states[name].size, sha256=found)
        return found

    def _source_file(self, name: str, sha256: str) -> SourceFile:
        return SourceFile(name=name, size=self.sources.states[name].size, sha256=sha256)

    @staticmethod
    def _entry(name: str, digest: FileDigest) -> ExportedFile:
        return ExportedFile(path=name, size=digest.size, sha256=digest.sha256, xxh3_128=digest.xxh3_128)

    def _write_manifest(self, manifest: Manifest) -> None:
        count = len(manifest.stages)
        stage_files = {stage_name(i, count): manifest.stage_json(i) for i in sorted(self.chosen)}
        for name, text in stage_files.items():
            self.staging.write(name, text.encode())
        written = {stage.name for stage in self.layout.stages if stage.index in self.chosen}
        small = {file.path for file in manifest.files} - {stage.name for stage in self.layout.stages}
        self.staging.keep_only(written | small | set(stage_files))
        self.staging.write(MANIFEST_NAME, manifest.to_json().encode())


def build_manifest(
    plan: Plan,
    *,
    layout: Layout,
    files: Collection[ExportedFile],
    source: Collection[SourceFile],
    packing: PackingRecord | None = None,
) -> Manifest:
    """Return the manifest with its own id; lists are sorted, so equal content gives equal bytes."""
    stages = tuple(
        ManifestStage(file=stage.name, **asdict(units)) for stage, units in zip(layout.stages, plan.ranges, strict=True)
    )
    draft = Manifest(
        export_id="0" * 64,
        plan_sha256=plan.sha256,
        dtype=layout.dtype,
        stages=stages,
        source=tuple(sorted(source, key=lambda file: file.name)),
        files=tuple(sorted(files, key=lambda file: file.path)),
        packing=packing,
    )
    return draft.model_copy(update={"export_id": draft.derived_id()})
