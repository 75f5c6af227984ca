"""A Hugging Face checkpoint folder, opened strictly: configuration, shard headers, and which unit owns which tensor.

Nothing here reads weights, imports torch, or runs code that lies in the folder.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plans.checkpoint.config import ModelConfig, read_config
from plans.checkpoint.header import SafetensorsHeader, TensorEntry, read_header
from plans.errors import InputError, IntegrityError, printable
from plans.reading.files import check_basename, explain_os_error, read_limited
from plans.reading.strict import parse_json

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 32 << 20
MAX_TENSORS = 500_000

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
_BY_NAME: Mapping[str, "UnitKey"] = {
    EMBEDDING: ("embedding", 0),
    **dict.fromkeys((FINAL_NORM, "model.norm.bias", HEAD, "lm_head.bias"), ("head", 0)),
}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.(.+)")
_IGNORED = re.compile(r".*rotary_emb\.inv_freq|.*\.rotary_emb\.cos_cached|.*\.rotary_emb\.sin_cached")

UnitKey = tuple[str, int]
"""("embedding", 0), ("layer", i) or ("head", 0)."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of a checkpoint."""

    name: str
    header: SafetensorsHeader


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes lie."""

    file: str
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class UnitTable:
    """The tensors that one unit owns, by their full Hugging Face names."""

    key: UnitKey
    tensors: Mapping[str, StoredTensor]

    @property
    def size_bytes(self) -> int:
        """Stored bytes of the unit."""
        return sum(stored.entry.size_bytes for stored in self.tensors.values())

    @property
    def shapes_sha256(self) -> str:
        """Hash of the unit's (local name, dtype, shape) rows; what a plan binds to. Equal for equal layers."""
        return hash_shapes({local_name(name): (t.entry.dtype, t.entry.shape) for name, t in self.tensors.items()})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint. A bare `config.json` has no directory, no shards and no tensors."""

    path: Path
    directory: Path | None
    config: ModelConfig
    shards: tuple[Shard, ...]
    tensors: Mapping[str, StoredTensor]
    warnings: tuple[str, ...]

    @property
    def has_weights(self) -> bool:
        """Whether the headers of real weights were read."""
        return bool(self.tensors)


def hash_shapes(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """Return the sha256 over sorted rows ``name dtype d0,d1,...``."""
    rows = (f"{name} {dtype} {','.join(map(str, shape))}\n" for name, (dtype, shape) in sorted(shapes.items()))
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def local_name(name: str) -> str:
    """Return a layer's tensor name without ``model.layers.N.``; other names unchanged."""
    match = _LAYER.fullmatch(name)
    return match.group(2) if match else name


def unit_of(name: str) -> UnitKey | None:
    """Return the unit that owns tensor `name`, or None for tensors no unit computes with."""
    if _IGNORED.fullmatch(name):
        return None
    match = _LAYER.fullmatch(name)
    if match:
        return ("layer", int(match.group(1)))
    return _BY_NAME.get(name)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or a bare `config.json` (planning before downloading).

    Args:
        path: folder with `config.json` and safetensors files, or the path of a configuration file.

    Raises:
        InputError: a file is missing, malformed or contradicts another; the message names it.
        IntegrityError: a shard is truncated or its layout is broken.
        MachineError: a file cannot be read.
    """
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise (explain_os_error(error, path) if isinstance(error, OSError) else InputError(str(error))) from None
    if is_file and path.suffix == ".json":
        return Checkpoint(path, None, read_config(path), (), {}, ())
    if not is_dir:
        what = "is a file, not a checkpoint folder" if path.exists() else "no such file or folder"
        raise InputError(
            what,
            where=path,
            expected=f"a folder with {CONFIG_NAME} and *.safetensors, or a {CONFIG_NAME}",
            code="E-MISSING",
        )
    return _open_folder(path)


def _open_folder(folder: Path) -> Checkpoint:
    names = _list_folder(folder)
    if CONFIG_NAME not in names:
        raise InputError(
            f"no {CONFIG_NAME} in the folder",
            where=folder,
            expected=f"{CONFIG_NAME} and {SINGLE_NAME} or {INDEX_NAME}",
            code="E-MISSING",
        )
    _check_links(folder, names)
    config = read_config(folder / CONFIG_NAME)
    warnings = _custom_code_warnings(config, names)
    if INDEX_NAME in names:
        shards, index_warnings = _open_indexed(folder, names)
        warnings += index_warnings
    else:
        shards = (Shard(SINGLE_NAME, read_header(folder / _single_file(folder, names))),)
    tensors = _merge(folder, shards)
    _check_units(folder, config, tensors)
    return Checkpoint(folder, folder, config, shards, tensors, tuple(warnings))


def _list_folder(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise explain_os_error(error, folder) from None


def link_home(folder: Path) -> Path:
    """Return the folder that links inside a checkpoint may not leave: its own, or the repository of a snapshot."""
    home = folder.resolve()
    return home.parent.parent if home.parent.name == "snapshots" else home


def _check_links(folder: Path, names: set[str]) -> None:
    """Refuse links that lead nowhere or out of the folder; a Hugging Face snapshot may link into its own repository."""
    tree = link_home(folder)
    for name in sorted(names):
        path = folder / name
        if not (name in {CONFIG_NAME, INDEX_NAME} or name.endswith(".safetensors")) or not path.is_symlink():
            continue
        if not path.exists():
            raise _incomplete(folder, f"{printable(name)} is a link to a file that is not there")
        if not path.resolve().is_relative_to(tree):
            raise InputError(
                f"{printable(name)} is a link out of the folder",
                where=folder,
                hint="copy the file into the folder",
                code="E-SYMLINK",
            )


def _incomplete(folder: Path, what: str) -> InputError:
    return InputError(f"{what}: the download is incomplete", where=folder, hint="finish it first", code="E-INCOMPLETE")


def _is_downloading(folder: Path) -> bool:
    """Whether the Hugging Face cache that holds this snapshot has a blob under way."""
    home = folder.resolve()
    return home.parent.name == "snapshots" and any((home.parent.parent / "blobs").glob("*.incomplete"))


def _custom_code_warnings(config: ModelConfig, names: set[str]) -> list[str]:
    if config.runs_custom_code or any(name.endswith(".py") for name in names):
        return ["the checkpoint brings Python code of its own, or names some elsewhere; it is ignored and never run"]
    return []


def _single_file(folder: Path, names: set[str]) -> str:
    if SINGLE_NAME in names:
        return SINGLE_NAME
    others = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf")))
    incomplete = sorted(n for n in names if n.endswith((".incomplete", ".part")))
    if incomplete or _is_downloading(folder):
        raise _incomplete(folder, f"no {SINGLE_NAME}" + (f", but {printable(incomplete[0])}" if incomplete else ""))
    if others:
        raise InputError(
            f"holds {printable(others[0])}, which is not safetensors",
            where=folder,
            expected=f"{SINGLE_NAME} or {INDEX_NAME}",
            hint="convert it: AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET)",
            code="E-FORMAT",
        )
    raise InputError(
        "no weights in the folder", where=folder, expected=f"{SINGLE_NAME} or {INDEX_NAME}", code="E-MISSING"
    )


def _open_indexed(folder: Path, names: set[str]) -> tuple[tuple[Shard, ...], list[str]]:
    path = folder / INDEX_NAME
    document = parse_json(read_limited(path, max_bytes=MAX_INDEX_BYTES), where=path)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError("weight_map is not a table of file names", where=path, code="E-INDEX")
    if not 1 <= len(weight_map) <= MAX_TENSORS:
        raise InputError(
            f"weight_map lists {len(weight_map)} tensors",
            where=path,
            expected=f"1 to {MAX_TENSORS}",
            code="E-INDEX",
        )
    files = sorted({check_basename(name, where=path) for name in weight_map.values()})
    shards = tuple(Shard(name, _open_shard(folder, name, path)) for name in files)
    _compare_index(path, weight_map, shards)
    warnings = _total_size_warning(document, shards)
    if SINGLE_NAME in names and SINGLE_NAME not in files:
        warnings.append(f"both {INDEX_NAME} and {SINGLE_NAME} are present; the index is used")
    return shards, warnings


def _open_shard(folder: Path, name: str, index: Path) -> SafetensorsHeader:
    shard = folder / name
    if not shard.exists():
        if _is_downloading(folder):
            raise _incomplete(folder, f"{name} is missing")
        raise InputError(f"lists {name}, which is missing", where=index, hint="fetch it again", code="E-INDEX")
    return read_header(shard)


def _compare_index(path: Path, weight_map: Mapping[str, str], shards: tuple[Shard, ...]) -> None:
    for shard in shards:
        listed = {name for name, file in weight_map.items() if file == shard.name}
        missing = sorted(listed - set(shard.header.tensors))
        if missing:
            raise InputError(
                f"says {printable(missing[0])} is in {shard.name}, which does not hold it",
                where=path,
                code="E-INDEX",
            )
        extra = sorted(set(shard.header.tensors) - listed)
        if extra:
            raise InputError(
                f"{shard.name} holds {printable(extra[0])}, which the index "
                + ("maps to another file" if extra[0] in weight_map else "does not list"),
                where=path,
                code="E-INDEX",
            )


def _total_size_warning(document: Mapping[str, Any], shards: tuple[Shard, ...]) -> list[str]:
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or "total_size" not in metadata:
        return []
    stated = metadata["total_size"]
    actual = sum(e.size_bytes for shard in shards for e in shard.header.tensors.values())
    if type(stated) in (int, float) and stated == actual:
        return []
    return [f"{INDEX_NAME} states total_size {printable(stated, limit=30)}, the headers hold {actual} bytes"]


def _merge(folder: Path, shards: tuple[Shard, ...]) -> Mapping[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, entry in shard.header.tensors.items():
            if name in tensors:
                raise InputError(
                    f"{name} is in {tensors[name].file} and in {shard.name}", where=folder, code="E-DUPLICATE"
                )
            tensors[name] = StoredTensor(shard.name, entry)
    return tensors


def _check_units(folder: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Every unit must be there and nothing may lie beyond the last layer."""
    owners = {unit_of(name) for name in tensors}
    present = {key[1] for key in owners if key and key[0] == "layer"}
    beyond = sorted(i for i in present if i >= config.num_hidden_layers + config.num_mtp_layers)
    gaps = sorted(set(range(config.num_hidden_layers)) - present)
    if beyond:
        raise InputError(
            f"holds layer {beyond[0]}, but {CONFIG_NAME} says num_hidden_layers {config.num_hidden_layers}",
            where=folder,
            code="E-LAYERS",
        )
    if gaps:
        raise InputError(
            f"no tensors of layer {gaps[0]}",
            where=folder,
            expected=f"layers 0 to {config.num_hidden_layers - 1}",
            code="E-LAYERS",
        )
    required = [EMBEDDING, FINAL_NORM] + ([] if config.tie_word_embeddings else [HEAD])
    for name in required:
        if name not in tensors:
            says = "is false" + (
                "" if "tie_word_embeddings" in config.raw else " by default (config.json says nothing)"
            )
            tied = f" and tie_word_embeddings {says}" if name == HEAD else ""
            raise InputError(f"no tensor {name}{tied}", where=folder, code="E-LAYERS")
    rows = [config.vocab_size, config.hidden_size]
    for name in (EMBEDDING, HEAD):
        if name in tensors and list(tensors[name].entry.shape) != rows:
            raise InputError(
                f"{name} has shape {list(tensors[name].entry.shape)}, {CONFIG_NAME} says {rows}",
                where=folder,
                code="E-SHAPE",
            )


def unit_tables(checkpoint: Checkpoint) -> tuple[UnitTable, ...]:
    """Return the units in chain order with the tensors each owns.

    A tied head without a tensor of its own owns the embedding tensor too: it needs those bytes wherever it runs.
    """
    owned: dict[UnitKey, dict[str, StoredTensor]] = {key: {} for key in unit_keys(checkpoint.config)}
    for name, stored in checkpoint.tensors.items():
        key = unit_of(name)
        if key is not None and key in owned:  # a layer that only predicts further tokens is no unit
            owned[key][name] = stored
    head = owned["head", 0]
    if checkpoint.config.tie_word_embeddings:
        table = head.get(HEAD) or checkpoint.tensors.get(EMBEDDING)  # a stage's bundle may hold neither
        if table is not None:
            head[HEAD] = table
    return tuple(UnitTable(key, tensors) for key, tensors in owned.items())


def unit_keys(config: ModelConfig) -> tuple[UnitKey, ...]:
    """Return the keys of all units in chain order."""
    layers = [("layer", i) for i in range(config.num_hidden_layers)]
    return (("embedding", 0), *layers, ("head", 0))


def unexpected_tensors(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of stored tensors that no unit owns and that are not known leftovers."""
    units = set(unit_keys(checkpoint.config))
    return tuple(n for n in checkpoint.tensors if unit_of(n) not in units and not _IGNORED.fullmatch(n))


def require_full(checkpoint: Checkpoint) -> Path:
    """Return the folder, or raise when only a configuration was given.

    Raises:
        InputError: the checkpoint is a bare configuration.
    """
    if checkpoint.directory is None:
        raise InputError(
            "is only a configuration; the weights are needed here",
            where=checkpoint.path,
            hint="give the checkpoint folder",
            code="E-MISSING",
        )
    return checkpoint.directory


def check_same_shapes(expected: Mapping[UnitKey, str], checkpoint: Checkpoint) -> None:
    """Compare recorded `shapes_sha256` per unit with the checkpoint's.

    Raises:
        IntegrityError: naming the first unit that differs and both hashes.
    """
    tables = unit_tables(checkpoint)
    if len(tables) != len(expected):
        raise IntegrityError(
            f"another model: it has {len(tables) - 2} layers, the plan was made for {len(expected) - 2}",
            where=checkpoint.path,
            hint="solve again for this model",
            code="E-MODEL",
        )
    for table in tables:
        recorded, found = expected.get(table.key, ""), table.shapes_sha256
        if recorded != found:
            name = table.key[0] if table.key[0] != "layer" else f"layer {table.key[1]}"
            raise IntegrityError(
                f"another model: the tensors of the {name} hash to {found}, the plan was made for {recorded or 'none'}",
                where=checkpoint.path,
                hint="solve again for this model",
                code="E-MODEL",
            )


__all__ = [
    "Checkpoint",
    "Shard",
    "StoredTensor",
    "UnitKey",
    "UnitTable",
    "check_same_shapes",
    "hash_shapes",
    "link_home",
    "local_name",
    "open_checkpoint",
    "require_full",
    "unexpected_tensors",
    "unit_keys",
    "unit_of",
    "unit_tables",
]
