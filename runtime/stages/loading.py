"""From a checkpoint folder, or any lazy source of tensors, to a chain."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig

from plans.checkpoint.folder import Checkpoint, open_checkpoint, require_full
from plans.checkpoint.run_dtype import run_dtype
from plans.dtypes import DTYPE_NAMES, DTYPES
from plans.errors import UsageError
from plans.stages import StageRange
from runtime.fast.native import Unavailable
from runtime.fast.setup import set_up
from runtime.fast.speed import Speed, parse_speed
from runtime.reading.devices import planned_device, torch_device
from runtime.reading.families import parse_model_config
from runtime.reading.generation_config import read_generation_config
from runtime.reading.weights import TensorSource
from runtime.stages.chain import Chain, build_chain


class FolderTensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint folder by name; a lookup maps the tensor, nothing is read before it is used.

    The files stay open, and must stay unchanged, for as long as a tensor of theirs lives.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = require_full(checkpoint)
        self._stored = checkpoint.tensors
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        if stored.file not in self._open:
            self._open[stored.file] = safe_open(self._folder / stored.file, framework="pt", device="cpu")
        tensor: torch.Tensor = self._open[stored.file].get_tensor(stored.name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored


def load(
    path: str | Path,
    *,
    stages: Sequence[StageRange] | None = None,
    device_map: Mapping[int, str] | None = None,
    dtype: str | None = None,
    speed: str = "reference",
) -> Chain:
    """Load a Hugging Face checkpoint folder as a chain of stages.

    Args:
        path: folder with `config.json` and safetensors files.
        stages: how to cut it; None for one stage with everything.
        device_map: stage index -> torch device, where it differs from the device the stage names.
        dtype: `fp32`, `bf16` or `fp16`; None keeps the checkpoint's.
        speed: as in `set_speed`.

    Raises:
        InputError, IntegrityError, MachineError: as `plans.checkpoint.folder.open_checkpoint` and `load_chain`.
    """
    checkpoint = open_checkpoint(Path(path))
    folder = require_full(checkpoint)
    config = parse_model_config(checkpoint.config.raw)
    config.name_or_path = str(path)
    chain = load_chain(
        config,
        stages or (StageRange.whole(config.num_hidden_layers),),
        FolderTensors(checkpoint),
        dtype=dtype or run_dtype(checkpoint),
        device_map=device_map,
        generation_config=read_generation_config(folder),
    )
    set_speed(chain, speed)
    return chain


def load_chain(
    config: PreTrainedConfig,
    stages: Sequence[StageRange],
    tensors: TensorSource,
    *,
    dtype: str,
    device_map: Mapping[int, str] | None = None,
    generation_config: GenerationConfig | None = None,
) -> Chain:
    """Build a chain from its parts.

    Args:
        config: the transformers configuration of the whole model.
        stages: the cut, in chain order.
        tensors: lazy tensors by Hugging Face name.
        dtype: `fp32`, `bf16` or `fp16`.
        device_map: stage index -> torch device, where it differs from the device the stage names.
        generation_config: the checkpoint's defaults for `generate()`; None derives them from `config`.

    Raises:
        UsageError: unknown dtype, or a device map for stages that do not exist.
        MachineError: a device is not on this machine.
        InputError: as `runtime.stages.chain.build_chain`.
    """
    chain = build_chain(
        config,
        stages,
        tensors,
        dtype=torch_dtype(dtype),
        devices=place_stages(stages, device_map=device_map or {}),
    )
    if generation_config is not None:
        chain.generation_config = generation_config
    return chain


def set_speed(chain: Chain, speed: str, *, progress: Callable[[str], None] | None = None) -> None:
    """Choose how a loaded chain computes on CPUs and on CUDA.

    Args:
        chain: the model; its `fast` and `reason` say what came of it.
        speed: `reference`, `auto` (the faster path, by measurement) or `max` (native kernels and CUDA graphs
            wherever possible).
        progress: told, in a few words, what takes time: compiling and measuring, once per machine.

    Raises:
        UsageError: `speed` is none of the three.
    """
    if chain.kv_cache_dtype not in (None, chain.dtype) and parse_speed(speed) is not Speed.REFERENCE:
        chain.fast, chain.reason = None, "the fast path keeps keys and values in the dtype it computes in"
        return
    fast = set_up(chain, chain.stages, chain.stage_devices, speed=parse_speed(speed), progress=progress)
    chain.fast = None if isinstance(fast, Unavailable) else fast
    chain.reason = None if fast is None else fast.reason


def place_stages(stages: Sequence[StageRange], *, device_map: Mapping[int, str]) -> tuple[torch.device, ...]:
    """Return the torch device of each stage, after overrides."""
    unknown = sorted(set(device_map) - set(range(len(stages))))
    if unknown:
        raise UsageError(
            f"the device map names stage {unknown[0]}",
            expected=f"a stage from 0 to {len(stages) - 1}",
            code="E-DEVICE",
        )
    return tuple(
        torch_device(device_map[index]) if index in device_map else planned_device(stage.device)
        for index, stage in enumerate(stages)
    )


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of `fp32`, `bf16`, `fp16` or their long names."""
    if name not in DTYPE_NAMES:
        raise UsageError(f"dtype {name} is not known", expected="fp32, bf16 or fp16", code="E-DTYPE")
    dtype: torch.dtype = getattr(torch, DTYPES[DTYPE_NAMES[name]].torch)
    return dtype
