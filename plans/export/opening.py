"""Open an export strictly: what `llamaplan export` wrote, checked before a single weight is used.

`open_export` checks everything but the weights' bytes; `check_fast` checks those of one stage by their fast checksum.
Together they refuse flipped bits, truncation, swapped or renamed stages and files mixed from two exports.
Nothing is created or changed, so an export may lie on read-only storage.
"""

import os
import stat as stat_bits
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from plans.check import read_plan
from plans.checkpoint.header import SafetensorsHeader, read_header
from plans.checkpoint.units import CONFIG_NAME
from plans.config.config import ModelConfig, read_config
from plans.errors import InputError, IntegrityError, LlamaplanError, UsageError, printable
from plans.export.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    PLAN_NAME,
    ExportedFile,
    Manifest,
    StageFile,
    stage_name,
)
from plans.export.tensors import check_metadata, check_tensors, metadata_of
from plans.plan import Plan
from plans.reading.digest import FileState, check_xxh3
from plans.reading.files import explain_os_error, read_limited, sha256_hex
from plans.reading.strict import MAX_KEYS, parse_json, validate_json

MAX_ROOT_FILE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """One stage's files, opened and checked (but for the weights' bytes)."""

    stage: int
    info: StageFile
    path: Path
    """The safetensors file."""
    header: SafetensorsHeader
    state: FileState
    """Of the safetensors file when it was opened; `check_unchanged` compares it again."""


@dataclass(frozen=True, slots=True)
class Export:
    """An opened export; `bundles` holds the stages that were asked for, by zero-based index."""

    directory: Path
    manifest: Manifest
    plan: Plan
    config: ModelConfig
    bundles: Mapping[int, Bundle]
    warnings: tuple[str, ...]

    @property
    def export_id(self) -> str:
        """Identity of the export: equal ids mean equal bytes."""
        return self.manifest.export_id

    @property
    def num_stages(self) -> int:
        """Number of stages of the whole export, whichever of them lie here."""
        return len(self.manifest.stages)


def open_export(directory: Path, *, stage: int | Collection[int] | None = None, expect_id: str | None = None) -> Export:
    """Open an export and check everything but the bytes of its weights.

    Args:
        directory: the folder `llamaplan export` wrote, or a copy that holds at least the stages asked for.
        stage: zero-based index, or several, of the stages that must be here; None for all.
        expect_id: the export id to insist on, when it is known from elsewhere.

    Raises:
        InputError: not an export, or a manifest that is malformed or of another version.
        IntegrityError: a file is missing, has another size or content, or belongs to another export.
        UsageError: no such stage.
        MachineError: a file cannot be read.

    Example:
        >>> export = open_export(Path("shards"), stage=0)  # doctest: +SKIP
        >>> check_fast(export, stage=0)  # doctest: +SKIP
    """
    manifest = read_manifest(directory)
    if expect_id is not None and expect_id != manifest.export_id:
        raise IntegrityError(
            f"the export id is {manifest.export_id}, not the {printable(expect_id)} that was asked for",
            where=directory,
            code="E-EXPORT-ID",
        )
    stages = _selected(stage, manifest)
    warnings = _stray_files(directory, manifest)
    weights = {entry.file for entry in manifest.stages}
    for file in manifest.files:
        if file.path not in weights:
            warnings += _check_plain(directory / file.path, file.size)
            _check_root_file(directory / file.path, file)
    plan = _read_plan(directory, manifest)
    bundles = {index: _open_bundle(directory, manifest, plan, index) for index in stages}
    for bundle in bundles.values():
        warnings += _mode_warnings(bundle.path, bundle.path.stat())
    config = read_config(directory / CONFIG_NAME)
    return Export(directory, manifest, plan, config, bundles, tuple(warnings))


def check_fast(export: Export, *, stage: int) -> None:
    """Compare the bytes of one stage's weights with the fast checksum in the manifest.

    Raises:
        IntegrityError: the file is damaged, or was changed since `open_export`.
        MachineError: the file cannot be read; names the offset.
    """
    bundle = export.bundles[stage]
    check_xxh3(bundle.path, expected=bundle.info.weights.xxh3_128)
    check_unchanged(export, stage=stage)


def check_unchanged(export: Export, *, stage: int) -> None:
    """Compare size, times and inode of a stage's weights with those at opening; for the end of a run.

    Raises:
        IntegrityError: the file was changed, replaced or removed meanwhile.
    """
    bundle = export.bundles[stage]
    try:
        now = FileState.of(bundle.path)
    except OSError as error:
        raise IntegrityError(f"vanished while in use (errno {error.errno})", where=bundle.path) from None
    if now != bundle.state:
        raise IntegrityError(
            f"was changed while in use ({bundle.state.size} bytes before, {now.size} now)",
            where=bundle.path,
            hint="leave an export alone while it runs; run again",
            code="E-CHANGED",
        )


def read_manifest(directory: Path) -> Manifest:
    """Read `manifest.json` strictly and recompute the export id; errors as `open_export`."""
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise InputError("no such folder", where=directory, expected="the folder of an export", code="E-MISSING")
    if not path.is_symlink() and not path.exists():
        raise InputError(
            f"no {MANIFEST_NAME}; not a complete export",
            where=directory,
            hint="write one with 'llamaplan export PLAN --model MODEL -o DIR'",
            code="E-MISSING",
        )
    _refuse_link(path)
    data = read_limited(path, max_bytes=MAX_MANIFEST_BYTES)
    _check_version(data, path)
    manifest = validate_json(Manifest, data, where=path)
    derived = manifest.derived_id()
    if manifest.export_id != derived:
        raise IntegrityError(
            f"the export id reads {manifest.export_id}, the content gives {derived}",
            where=path,
            hint="the manifest is damaged or was edited; copy it again",
            code="E-EXPORT-ID",
        )
    if manifest.to_json().encode() != data:
        raise IntegrityError("is not in the form it was written in", where=path, hint="copy it again")
    return manifest


def _check_version(data: bytes, path: Path) -> None:
    document = parse_json(data, where=path, max_keys=MAX_KEYS)
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is not int or version != 1:
        raise InputError(
            f"written for schema_version {printable(version, limit=40)}",
            where=path,
            expected="schema_version 1",
            hint="export again with this version, or use the one that wrote it",
            code="E-VERSION",
        )


def _selected(stage: int | Collection[int] | None, manifest: Manifest) -> tuple[int, ...]:
    count = len(manifest.stages)
    if stage is None:
        return tuple(range(count))
    stages = (stage,) if isinstance(stage, int) else tuple(sorted(set(stage)))
    for index in stages:
        if not 0 <= index < count:
            raise UsageError(f"there is no stage {index}", expected=f"0 to {count - 1}")
    return stages


def _stray_files(directory: Path, manifest: Manifest) -> list[str]:
    count = len(manifest.stages)
    known = {MANIFEST_NAME, *(file.path for file in manifest.files), *(stage_name(i, count) for i in range(count))}
    try:
        strays = sorted(entry.name for entry in directory.iterdir() if entry.name not in known)
    except OSError as error:
        raise explain_os_error(error, directory) from None
    return [f"{printable(name)} in {directory} is not part of the export and is ignored" for name in strays]


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise InputError("is a symbolic link", where=path, expected="a regular file", code="E-LINK")


def _check_plain(path: Path, size: int) -> list[str]:
    """Check that a listed file is there, is a regular file and has its size; return warnings about its mode."""
    _refuse_link(path)
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise IntegrityError(
            "is missing", where=path, expected=f"{size} bytes", hint="copy it from the export", code="E-MISSING"
        ) from None
    except OSError as error:
        raise explain_os_error(error, path) from None
    if not stat_bits.S_ISREG(status.st_mode):
        raise InputError("not a regular file", where=path, code="E-LINK")
    if status.st_size != size:
        raise IntegrityError(
            f"has {status.st_size} bytes, the manifest says {size}",
            where=path,
            hint="the copy is incomplete or damaged; copy it again",
            code="E-TRUNCATED",
        )
    return _mode_warnings(path, status)


def _mode_warnings(path: Path, status: os.stat_result) -> list[str]:
    problems = []
    if status.st_mode & 0o111:
        problems.append("is executable")
    if status.st_mode & 0o002:
        problems.append("can be written by everybody")
    if status.st_uid not in {0, os.geteuid()}:
        problems.append(f"belongs to user {status.st_uid}")
    return [f"{path} {' and '.join(problems)}"] if problems else []


def _check_root_file(path: Path, file: ExportedFile) -> None:
    found = sha256_hex(read_limited(path, max_bytes=MAX_ROOT_FILE_BYTES))
    if found != file.sha256:
        raise IntegrityError(
            f"has sha256 {found}, the manifest says {file.sha256}",
            where=path,
            hint="the file is damaged or belongs to another export; copy it again",
            code="E-DAMAGED",
        )


def _read_plan(directory: Path, manifest: Manifest) -> Plan:
    path = directory / PLAN_NAME
    plan = read_plan(path)
    if plan.sha256 != manifest.plan_sha256:
        raise IntegrityError(
            f"has sha256 {plan.sha256}, the manifest was written for {manifest.plan_sha256}",
            where=path,
            code="E-DAMAGED",
        )
    if (plan.weights is None) != (manifest.packing is None):
        wanted = "packed weights" if plan.weights is not None else "weights as they were stored"
        raise IntegrityError(f"wants {wanted}, the manifest says otherwise", where=path, code="E-DAMAGED")
    if plan.ranges != tuple(stage.range for stage in manifest.stages):
        raise IntegrityError("its stages are not those of the manifest", where=path, code="E-DAMAGED")
    return plan


def _open_bundle(directory: Path, manifest: Manifest, plan: Plan, index: int) -> Bundle:
    info = _read_stage_file(directory, manifest, index)
    path = directory / info.weights.path
    _check_plain(path, info.weights.size)
    state = FileState.of(path)
    try:
        header = read_header(path)
    except InputError as error:
        # The size is right and the name is listed, so a bad header means damaged bytes.
        raise IntegrityError(error.what, where=error.where, hint="copy the file again", code="E-DAMAGED") from None
    check_metadata(path, header, index=index, manifest=manifest)
    check_tensors(path, header, index=index, manifest=manifest, plan=plan)
    return Bundle(index, info, path, header, state)


def _read_stage_file(directory: Path, manifest: Manifest, index: int) -> StageFile:
    expected = manifest.stage_json(index).encode()
    path = directory / stage_name(index, len(manifest.stages))
    _refuse_link(path)
    if not path.exists():
        raise IntegrityError("is missing", where=path, hint="copy it from the export", code="E-MISSING")
    data = read_limited(path, max_bytes=MAX_MANIFEST_BYTES)
    if data != expected:
        raise IntegrityError(
            f"does not belong to export {manifest.export_id}{_foreign_id(data, path, manifest)}",
            where=path,
            hint="copy the stage's two files from the same export as the manifest",
            code="E-STAGE",
        )
    return validate_json(StageFile, data, where=path)


def _foreign_id(data: bytes, path: Path, manifest: Manifest) -> str:
    try:
        other = StageFile.from_json(data, where=path)
    except LlamaplanError:
        return " and is damaged"
    if other.export_id != manifest.export_id:
        return f" but to {other.export_id}"
    return f"; it describes stage {other.stage}"


__all__ = [
    "Bundle",
    "Export",
    "check_fast",
    "check_unchanged",
    "metadata_of",
    "open_export",
    "read_manifest",
]
