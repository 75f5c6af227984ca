"""Plans that want packed weights, and how tests look at packed tensors."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.units import unit_tables
from plans.memory import stage_memory
from plans.packed.choice import WeightChoice
from plans.packed.tensors import scheme_of_tensor
from plans.plan import Plan
from tests.exporter.export_helpers import make_plan


def packed_plan(
    model: Path, boundaries: Sequence[int], *, bits: int | Sequence[int] = 4, head_bits: int = 16, **options: Any
) -> Plan:
    """A plan whose layers have so many bits each, with every byte count that follows from it."""
    plan = make_plan(model, boundaries, **options)
    layers = plan.profile.model.num_hidden_layers
    layer_bits = (bits,) * layers if isinstance(bits, int) else tuple(bits)
    kind: Any = {(4,): "int4", (8,): "int8"}.get(tuple(set(layer_bits)), "mixed")
    choice = WeightChoice(kind=kind, layer_bits=layer_bits, head_bits=head_bits)
    units = []
    for unit, table in zip(plan.profile.units, unit_tables(open_checkpoint(model)), strict=True):
        size = unit.weight_bytes
        for name, stored in table.tensors.items():
            shape = stored.entry.shape
            scheme = scheme_of_tensor(choice, name, shape)
            if scheme is not None:
                size += scheme.size_bytes(*shape) - shape[0] * shape[1] * (4 if plan.profile.dtype == "fp32" else 2)
        units.append(unit.model_copy(update={"weight_bytes": size}))
    profile = plan.profile.model_copy(update={"units": tuple(units)})
    stages = tuple(
        stage.model_copy(
            update=asdict(
                stage_memory(profile, workload=plan.workload, stage=stage.range, overhead_bytes=stage.overhead_bytes)
            )
        )
        for stage in plan.stages
    )
    share = max(stage.total_bytes / stage.budget_bytes for stage in stages)
    prediction = plan.prediction.model_copy(update={"max_memory_share": share})
    return plan.model_copy(update={"profile": profile, "stages": stages, "prediction": prediction, "weights": choice})


def dequantised(folder: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """The weights of a checkpoint folder as torch tensors, packed ones as number x scale in a dtype or the scales'."""
    import torch
    from safetensors.torch import load_file

    from plans.packed.scheme import Scheme
    from plans.packed.words import unpack_numbers

    stored: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    weights = {name: tensor for name, tensor in stored.items() if ".weight_" not in name}
    for name in stored.keys() - weights.keys():
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            out, in_ = stored[f"{module}.weight_shape"].tolist()
            scheme = Scheme(4 if stored[name].shape[1] * 8 == in_ else 8, 32)
            words = memoryview(stored[name].numpy().tobytes())
            scale = stored[f"{module}.weight_scale"]
            scale = scale.to(getattr(torch, dtype)) if dtype else scale
            numbers = torch.from_numpy(unpack_numbers(words, scheme)).reshape(out, -1, 32).to(scale.dtype)
            weights[f"{module}.weight"] = (numbers * scale[:, :, None]).reshape(out, in_)
    return weights


def edit_tensor(folder: Path, name: str, *, place: int, change: float) -> None:
    """Add to one value of a tensor in a folder with one file."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[place] += change
    save_file(tensors, path, metadata={"format": "pt"})
