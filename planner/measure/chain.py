"""A short chain of a model's shape: the embedding, a few distinct layers and the head, with real or random weights."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from planner.devices.nvml import cuda_devices
from planner.measure.points import default_checkpoint
from planner.model import formula
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.names import EMBEDDING, HEAD, unit_of
from plans.checkpoint.units import Checkpoint
from plans.config.config import ModelConfig
from plans.dtypes import DtypeName
from plans.stages import StageRange
from runtime.reading.capacity import memory_faults
from runtime.reading.families import PER_LAYER_KEYS, parse_model_config
from runtime.reading.tensors import FolderTensors, torch_dtype
from runtime.reading.weights import TensorSource
from runtime.stages.chain import Chain
from runtime.stages.loading import load_chain, set_speed

PathName = Literal["reference", "fast"]
BLOCK_VALUES = 1 << 20
WEIGHT_SCALE = 0.02


class RandomTensors(Mapping[str, torch.Tensor]):
    """Random weights for a shape, made when they are looked up; embedding and head share one table.

    Each tensor is memory of its own, filled with one block of random values again and again: as slow to read as real
    weights, and quick to make.
    """

    def __init__(self, checkpoint: Checkpoint, *, num_layers: int, dtype: torch.dtype) -> None:
        config = checkpoint.config
        layer = formula.layer_shapes(config)
        ends = formula.embedding_shapes(config) | formula.head_shapes(config)
        layers = {f"model.layers.{i}.{name}": shape for i in range(num_layers) for name, shape in layer.items()}
        self._shapes = {name: shape for name, shape in (ends | layers).items() if not _is_tied_head(config, name)}
        generator = torch.Generator().manual_seed(0)
        self._block = (torch.randn(BLOCK_VALUES, generator=generator) * WEIGHT_SCALE).to(dtype)
        self._table: torch.Tensor | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in (EMBEDDING, HEAD):
            return self._filled(self._shapes[name])
        if self._table is None:
            self._table = self._filled(self._shapes[EMBEDDING])
        return self._table

    def _filled(self, shape: Sequence[int]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(*shape, dtype=self._block.dtype)  # a norm
        flat = torch.empty(torch.Size(shape).numel(), dtype=self._block.dtype)
        for part in torch.split(flat, BLOCK_VALUES):
            part.copy_(self._block[: len(part)])
        return flat.view(*shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class FirstLayers(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint that a model of its first layers has."""

    def __init__(self, checkpoint: Checkpoint, *, num_layers: int) -> None:
        self._all = FolderTensors(checkpoint)
        self._names = tuple(name for name in self._all if _is_kept(name, num_layers))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def short_chain(
    checkpoint: Checkpoint, *, num_layers: int, dtype: DtypeName, device: str, path: PathName = "reference"
) -> Chain:
    """Build the embedding, the first layers and the head of a model as three stages on one device.

    Args:
        checkpoint: real weights are mapped as in a run; a bare configuration gets random ones.
        num_layers: layers to keep.
        dtype: what to compute in.
        device: a device of this machine.
        path: how to compute; `fast` means as `llamarun --speed auto` does, which may be `reference` after all.
    """
    config = parse_model_config(first_layers_config(checkpoint.config, num_layers))
    tensors: TensorSource = (
        FirstLayers(checkpoint, num_layers=num_layers)
        if checkpoint.has_weights
        else RandomTensors(checkpoint, num_layers=num_layers, dtype=torch_dtype(dtype))
    )
    stages = (
        StageRange(device, 0, 0, has_embedding=True, has_head=False),
        StageRange(device, 0, num_layers, has_embedding=False, has_head=False),
        StageRange(device, num_layers, num_layers, has_embedding=False, has_head=True),
    )
    with memory_faults("loading the layers to time"):
        chain = load_chain(config, stages, tensors, dtype=dtype)
        set_speed(chain, "auto" if path == "fast" else "reference")
    return chain


def first_layers_config(config: ModelConfig, num_layers: int) -> dict[str, Any]:
    """Return what `config.json` says of a model of the first layers."""
    raw = copy.deepcopy(dict(config.raw))
    raw |= {key: raw[key][:num_layers] for key in PER_LAYER_KEYS if raw.get(key) is not None}
    return raw | {"num_hidden_layers": num_layers}


def _is_tied_head(config: ModelConfig, name: str) -> bool:
    return name == HEAD and config.tie_word_embeddings


def _is_kept(name: str, num_layers: int) -> bool:
    unit = unit_of(name)
    return unit is not None and (unit[0] != "layer" or unit[1] < num_layers)


def use_memory(
    model: Path | None,
    *,
    dtype: DtypeName,
    device: str,
    num_layers: int,
    threads: int,
    path: PathName,
    prompt_tokens: int,
    new_tokens: int,
) -> dict[str, int]:
    """Run a short chain in this process as `llamarun` would, and return the bytes it took.

    Returns:
        `weight_bytes` of the chain (all of them read, since mapped pages count once they are touched), `peak_bytes` of
        main memory, and `device_bytes` on an accelerator.
    """
    import runtime.results.bench  # noqa: F401 - what a run loads
    from runtime.engine.run import generate
    from runtime.generate.limits import Limits
    from runtime.generate.sampling import Sampling
    from runtime.reading.capacity import peak_memory_bytes
    from runtime.reading.tokenizer import load_tokenizer
    from runtime.stages.traffic import read_bandwidth

    checkpoint = open_checkpoint(model) if model is not None else default_checkpoint()
    before = _accelerator_free_bytes(device)
    if threads:
        torch.set_num_threads(threads)
    tokenizer = None
    if checkpoint.directory is not None and (checkpoint.directory / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(checkpoint.directory, vocab_size=checkpoint.config.vocab_size)
    chain = short_chain(checkpoint, num_layers=num_layers, dtype=dtype, device=device, path=path)
    limits = Limits(context_tokens=prompt_tokens + new_tokens, max_tokens=new_tokens)
    with memory_faults("measuring memory"):
        generate(chain, [[1] * prompt_tokens], sampling=Sampling(), limits=limits)
        read_bandwidth(chain, repeats=1)
    weights = {weight.data_ptr(): weight.nbytes for weight in chain.parameters()}
    del tokenizer
    return {
        "weight_bytes": sum(weights.values()),
        "peak_bytes": peak_memory_bytes(),
        "device_bytes": before - _accelerator_free_bytes(device),
    }


def _accelerator_free_bytes(device: str) -> int:
    """What the driver says is free; asking torch would create its context first."""
    return next((gpu.free_bytes for gpu in cuda_devices() if f"cuda:{gpu.index}" == device), 0)
