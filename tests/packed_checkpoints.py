"""Checkpoints with packed weights, made by compressed-tensors' own compressor from ordinary ones."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from plans.packed.config import quantization_config
from plans.packed.scheme import INT4, INT8, Scheme

SchemeOf = Callable[[str], Scheme | None]


def projections(scheme: Scheme) -> SchemeOf:
    """The same scheme for every matrix of every layer."""
    return lambda module: scheme if module.endswith("_proj") else None


def _mixed(module: str) -> Scheme | None:
    """Odd layers in int4 and even ones in int8, one layer as it is, and a head of its own in int8."""
    layer = int(module.split(".")[2]) if module.startswith("model.layers.") else -1
    return INT8 if module == "lm_head" else None if layer == 3 else INT4 if layer % 2 else INT8


KINDS: Mapping[str, SchemeOf] = {
    "int4": projections(INT4),
    "int8": projections(INT8),
    "int4 g64": projections(Scheme(4, 64)),
    "int8 per row": projections(Scheme(8, None)),
    "int4 per row": projections(Scheme(4, None)),
    "mixed": lambda module: _mixed(module) if module.endswith("_proj") or module == "lm_head" else None,
}
"""What the shipped checkpoint is packed as."""


def pack_checkpoint(source: Path, target: Path, *, scheme_of: SchemeOf, scale_dtype: torch.dtype | None = None) -> Path:
    """Write a copy of `source` as one file in `target`, every matrix that has a scheme packed."""
    from safetensors.torch import load_file, save_file

    leave_out = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(source, target, ignore=leave_out)
    tensors, schemes, others = dict[str, torch.Tensor](), dict[str, Scheme](), ["lm_head"]
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            module = name.removesuffix(".weight")
            scheme = scheme_of(module) if tensor.dim() == 2 else None
            if scheme is None:
                tensors[name] = tensor
                others += [module] if module.endswith("_proj") else []
                continue
            schemes[module] = scheme
            tensors |= {f"{module}.{part}": t for part, t in pack(tensor, scheme, scale_dtype=scale_dtype).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    edit_config(target, quantization_config=quantization_config(schemes, ignore=others))
    return target


def pack(weight: torch.Tensor, scheme: Scheme, *, scale_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return the three tensors of a matrix, rounded to nearest by the largest number of every group."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    largest = weight.float().unflatten(-1, (scheme.num_groups(weight.shape[1]), -1)).abs().amax(-1)
    scale = (largest / (2 ** (scheme.bits - 1) - 1)).to(scale_dtype or weight.dtype)
    state = {"weight": weight, "weight_scale": scale}
    return PackedQuantizationCompressor.compress(state, quantization_scheme(scheme))


def quantization_scheme(scheme: Scheme) -> Any:
    """Return the scheme as compressed-tensors calls it."""
    from compressed_tensors.quantization import QuantizationScheme

    group = quantization_config({"model.layers.0.mlp.up_proj": scheme})["config_groups"]["group_00"]
    return QuantizationScheme.model_validate(group)


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")
