"""What is timed: layers as a checkpoint stores them, or, for a width it is not stored in, random ones in a file.

A stand-in is a packed checkpoint of a few layers, written where it is read from as an export is: mapped, by the kernels
that a run has. Its layers are all of one kind, so that a model of unlike layers has one for each kind.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

import torch

from planner.measure.chain import BLOCK_VALUES, WEIGHT_SCALE, first_layers_config
from planner.model import formula
from planner.model.packing import stored_rows
from planner.model.widths import Packed
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.names import HEAD, UnitKey, local_name, prefix_of
from plans.checkpoint.units import CONFIG_NAME, SINGLE_NAME, TOKENIZER_NAMES, Checkpoint, unit_keys
from plans.config.config import ModelConfig, parse_config
from plans.dtypes import DTYPES, STORED_DTYPES, DtypeName
from plans.errors import MachineError
from plans.packed.config import quantization_config
from plans.packed.scheme import PACKED, SCALE, SHAPE, Scheme, is_linear
from plans.profile import ModelProfile, PackedName
from plans.reading.digest import BUFFER_BYTES

SchemeOf = Callable[[str, formula.Shape], Scheme | None]
"""How a matrix is stored, by its module and shape."""
Tensors = dict[str, tuple[str, formula.Shape]]
"""Name -> (stored dtype, shape)."""
MATRIX = 2
DATA_ALIGNMENT = 64
"""Where data start in a file, as in an export's."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model all of whose layers are of one kind.

    Attributes:
        profile: what is timed, by the names that a plan finds it by.
        source: the checkpoint it is about.
        scheme_of: how the layers, and the head, of a stand-in are packed; None where the checkpoint itself is timed.
    """

    profile: ModelProfile
    source: Checkpoint
    scheme_of: SchemeOf | None = None

    @property
    def weights(self) -> PackedName | None:
        """How the layers are packed."""
        return self.profile.layers[0].weights

    @contextmanager
    def opened(self, num_layers: int) -> Iterator[Checkpoint]:
        """Yield a checkpoint of at least so many of its layers; a stand-in is there inside the block only.

        Raises:
            MachineError: a stand-in cannot be written.
        """
        if self.scheme_of is None:
            yield self.source
            return
        try:
            place = tempfile.TemporaryDirectory(prefix="llamaplan-measure-")
        except OSError as error:
            raise _cannot_write(num_layers, os.environ.get("TMPDIR", "temporary folder"), error) from error
        with place as folder:
            yield write_stand_in(
                Path(folder), self.source, scheme_of=self.scheme_of, num_layers=num_layers, dtype=self.profile.dtype
            )


def subjects_of(checkpoint: Checkpoint, plain: ModelProfile, width: Packed | None) -> tuple[Subject, ...]:
    """Return what has to be timed for a width, one subject for each way in which layers are stored.

    Args:
        checkpoint: the model.
        plain: it as it is stored.
        width: None for as it is stored.
    """
    profile = plain if width is None else width.profile
    kinds = {layer.weights: layer.index for layer in reversed(profile.layers)}
    if width is None and len(kinds) == 1 and (checkpoint.has_weights or checkpoint.config.packing is None):
        return (Subject(profile, checkpoint),)
    return tuple(
        Subject(_of_one_kind(profile, index), checkpoint, _like_layer(index, checkpoint.config, width))
        for index in sorted(kinds.values())
    )


def _of_one_kind(profile: ModelProfile, index: int) -> ModelProfile:
    """Return the model with the layer `index` in place of every layer."""
    kind, num = profile.layers[index], len(profile.layers)
    layers = (kind.model_copy(update={"index": place}) for place in range(num))
    return profile.model_copy(update={"units": (profile.embedding, *layers, profile.head)})


def _like_layer(index: int, config: ModelConfig, width: Packed | None) -> SchemeOf:
    """Return how matrices are stored where every layer is stored as the layer `index` is."""

    def scheme_of(module: str, shape: formula.Shape) -> Scheme | None:
        key = f"model.layers.{index}."
        name = key + local_name(module) if module.startswith("model.layers.") else module
        if width is not None:
            return width.choice.scheme_of(name, out=shape[0], in_=shape[1])
        if config.packing is None or (name == "lm_head" and config.tie_word_embeddings):
            return None
        return config.packing.scheme_of(name)

    return scheme_of


def write_stand_in(
    folder: Path, source: Checkpoint, *, scheme_of: SchemeOf, num_layers: int, dtype: DtypeName
) -> Checkpoint:
    """Write a packed checkpoint of random weights with the shapes of another one, and open it.

    Args:
        folder: an empty one.
        source: whose configuration and tokenizer it gets.
        scheme_of: how its matrices are stored.
        num_layers: how many of its layers are written.
        dtype: of everything that is not packed, and of scales.

    Raises:
        MachineError: it cannot be written.
    """
    raw = first_layers_config(source.config, num_layers) | {"dtype": DTYPES[dtype].torch}
    raw.pop("torch_dtype", None)
    shapes = _shapes(parse_config(raw | {"quantization_config": None}, where=source.path))
    linear = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == MATRIX}
    schemes = {module: scheme_of(module, shape) for module, shape in linear.items() if is_linear(module)}
    packed = {module: scheme for module, scheme in schemes.items() if scheme is not None}
    raw["quantization_config"] = quantization_config(packed, ignore=schemes.keys() | {"lm_head"}) if packed else None
    config = parse_config(raw, where=source.path)
    try:
        (folder / CONFIG_NAME).write_text(json.dumps(raw), encoding="utf-8")
        for name in TOKENIZER_NAMES:
            if source.directory is not None and (source.directory / name).is_file():
                shutil.copyfile(source.directory / name, folder / name)
        with (folder / SINGLE_NAME).open("wb") as file:
            _write_as_exports_are(file, _parts(stored_rows(shapes, config, prefix=""), shapes, packed))
    except OSError as error:
        raise _cannot_write(num_layers, folder, error) from error
    return open_checkpoint(folder)


def _cannot_write(num_layers: int, where: object, error: OSError) -> MachineError:
    return MachineError(
        f"cannot write {num_layers} packed layers to time: {error.strerror}",
        where=where,
        hint="point TMPDIR to a folder with more room",
        code="E-SPACE" if error.errno == errno.ENOSPC else "E-WRITE",
    )


def _shapes(config: ModelConfig) -> dict[str, formula.Shape]:
    """Return all tensors by their names, none of them packed; no head where it is tied."""
    found = {prefix_of(key) + name: shape for key in unit_keys(config) for name, shape in _unit(key, config).items()}
    return {name: shape for name, shape in found.items() if name != HEAD or not config.tie_word_embeddings}


def _unit(key: UnitKey, config: ModelConfig) -> formula.Shapes:
    by_kind = {"embedding": formula.embedding_shapes, "layer": formula.layer_shapes, "head": formula.head_shapes}
    return by_kind[key[0]](config)


def _write_as_exports_are(file: BinaryIO, parts: Iterable[bytes]) -> None:
    """Write in whole buffers of an export's size, so that both are cached in pages of one size."""
    buffer = bytearray()
    for part in parts:
        buffer += part
        while len(buffer) >= BUFFER_BYTES:
            file.write(buffer[:BUFFER_BYTES])
            del buffer[:BUFFER_BYTES]
    file.write(buffer)


def _parts(tensors: Tensors, shapes: Mapping[str, formula.Shape], schemes: Mapping[str, Scheme]) -> Iterator[bytes]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # What is no whole number of cache lines comes last, as in an export.
    placed = sorted(tensors.items(), key=lambda item: _size(*item[1]) % DATA_ALIGNMENT != 0)
    for name, (stored, shape) in placed:
        begin, end = end, end + _size(stored, shape)
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % DATA_ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    blocks = _Blocks()
    for name, (stored, shape) in placed:
        module = name.rpartition(".")[0]
        block = blocks.of(name, stored, shapes.get(f"{module}.weight", shape), schemes.get(module))
        size = _size(stored, shape)
        yield from repeat(block, size // len(block))
        yield block[: size % len(block)]


def _size(stored: str, shape: formula.Shape) -> int:
    return torch.Size(shape).numel() * STORED_DTYPES[stored].size_bytes


class _Blocks:
    """Bytes that are written again and again: as slow to read as real weights, and quick to make."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._values = torch.randn(BLOCK_VALUES, generator=generator) * WEIGHT_SCALE
        words = torch.randint(0, 256, (BLOCK_VALUES,), generator=generator, dtype=torch.uint8)
        self._words = words.numpy().tobytes()

    def of(self, name: str, stored: str, shape: formula.Shape, scheme: Scheme | None) -> bytes:
        """Return the block that a tensor consists of.

        Args:
            name: of the tensor.
            stored: its stored dtype.
            shape: [out, in] of its matrix, whether that is packed or not; or its own.
            scheme: how the matrix is packed.
        """
        part = name.rpartition(".")[2]
        if part == PACKED:
            return self._words
        if part == SHAPE:
            return b"".join(side.to_bytes(8, "little") for side in shape)
        if part == SCALE:
            assert scheme is not None
            return _bytes(torch.full((BLOCK_VALUES,), WEIGHT_SCALE / 2 ** (scheme.bits - 2)), stored)
        return _bytes(self._values if len(shape) == MATRIX else torch.ones(BLOCK_VALUES), stored)


def _bytes(values: torch.Tensor, stored: str) -> bytes:
    name = STORED_DTYPES[stored].name
    assert name is not None
    return values.to(getattr(torch, DTYPES[name].torch)).view(torch.uint8).numpy().tobytes()
