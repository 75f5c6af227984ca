"""An opened checkpoint as units: which tensors each of them owns."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plans.checkpoint.header import SafetensorsHeader, TensorEntry
from plans.checkpoint.names import UnitKey, head_name, is_leftover, local_name, unit_of
from plans.config.config import ModelConfig
from plans.errors import InputError, IntegrityError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these makes a tokenizer."""


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
    name: str
    """Its name in the file; the model may call it otherwise."""


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
    """By the names the model has for them."""
    warnings: tuple[str, ...]
    index_dtype: str | None = None
    """What the index says about the dtype, in torch's spelling."""
    format: Literal["safetensors", "gguf"] = "safetensors"
    """How the weights are stored. A GGUF file has no directory of its own: nothing else in its folder is read."""

    @property
    def has_weights(self) -> bool:
        """Whether the headers of real weights were read."""
        return bool(self.tensors)


def hash_shapes(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """Return the sha256 over sorted rows ``name dtype d0,d1,...``."""
    rows = (f"{name} {dtype} {','.join(map(str, shape))}\n" for name, (dtype, shape) in sorted(shapes.items()))
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def unit_tables(checkpoint: Checkpoint) -> tuple[UnitTable, ...]:
    """Return the units in chain order with the tensors each owns.

    A tied head without a tensor of its own owns the embedding's tensors too: it needs those bytes wherever it runs. An
    equal copy of the table is the same bytes.
    """
    owned: dict[UnitKey, dict[str, StoredTensor]] = {key: {} for key in unit_keys(checkpoint.config)}
    for name, stored in checkpoint.tensors.items():
        key = unit_of(name)
        if key is not None and key in owned:  # a layer that only predicts further tokens is no unit
            owned[key][name] = stored
    if checkpoint.config.tie_word_embeddings:
        head = owned["head", 0]
        for name, stored in owned["embedding", 0].items():  # a stage's bundle may hold none
            copy = head.get(head_name(name))
            if copy is None or copy.entry.dtype == stored.entry.dtype:
                head[head_name(name)] = stored
    return tuple(UnitTable(key, tensors) for key, tensors in owned.items())


def unit_keys(config: ModelConfig) -> tuple[UnitKey, ...]:
    """Return the keys of all units in chain order."""
    layers = [("layer", i) for i in range(config.num_hidden_layers)]
    return (("embedding", 0), *layers, ("head", 0))


def unexpected_tensors(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of stored tensors that no unit owns and that are not known leftovers."""
    units = set(unit_keys(checkpoint.config))
    return tuple(n for n in checkpoint.tensors if unit_of(n) not in units and not is_leftover(n))


def require_full(checkpoint: Checkpoint) -> Path:
    """Return the folder, or raise when only a configuration or a GGUF file was given.

    Raises:
        InputError: the checkpoint is a bare configuration, or of a format that is planned and exported, not run.
    """
    if checkpoint.format == "gguf":
        raise InputError(
            "is a GGUF file; it can be planned and exported, and llamarun runs the export",
            where=checkpoint.path,
            expected="a folder of safetensors",
            hint="write one: 'llamaplan export PLAN --model FILE.gguf -o DIR'; llama.cpp runs the file as it is: "
            "'llamaplan emit PLAN --for llama.cpp'",
            code="E-FORMAT",
        )
    if checkpoint.directory is None:
        raise InputError(
            "is only a configuration; the weights are needed here",
            where=checkpoint.path,
            expected=f"{SINGLE_NAME}, or {INDEX_NAME} and the files it lists",
            hint="give the folder of the whole checkpoint",
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
