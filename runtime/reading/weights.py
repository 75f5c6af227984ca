"""Give a meta-device model the weights of one stage: every tensor it needs, and nothing else.

Tensors come from a lazy mapping (Hugging Face name -> tensor); on a CPU, where the dtype is kept, they stay views of
the mapped file and are never copied.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from plans.checkpoint.names import EMBEDDING, HEAD, unit_of
from plans.errors import InputError, printable
from plans.packed.scheme import SCALE, is_expert_scale
from plans.stages import StageRange
from runtime.reading.experts import STORED_PARTS, PackedExperts
from runtime.reading.packed import STORED, PackedLinear, check_packed


def rebuild_buffers(model: PreTrainedModel, *, dtype: torch.dtype, device: torch.device, has_embedding: bool) -> None:
    """Give the non-persistent buffers of a meta-device model their values on `device`.

    Rotary frequencies are computed in fp32 on the CPU, as `from_pretrained` does, and then moved; they stay fp32
    whatever the dtype of the weights.
    """
    base: Any = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=model.config).to(device)
    if has_embedding and hasattr(base.embed_tokens, "embed_scale"):
        scale = torch.tensor(base.embed_tokens.scalar_embed_scale, dtype=dtype, device=device)
        base.embed_tokens.register_buffer("embed_scale", scale, persistent=False)


def check_filled(model: PreTrainedModel) -> None:
    """Require that nothing is left on the meta device (a family with a buffer that is not known here)."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"no values for {left}"


TensorSource = Mapping[str, torch.Tensor]
"""Hugging Face tensor name -> tensor; a lookup may read (map) the tensor, listing the names must not."""

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_STORED_BUFFER = re.compile(r".*\.rotary_emb\.(?:inv_freq|cos_cached|sin_cached)")
_EXPERT = re.compile(r"(model\.layers\.\d+\.)(?:block_sparse_moe|mlp)(\.experts)\.(\d+)\.(\w+)\.(weight\w*)")
_ROUTER = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.gate\.weight")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one parameter is made from stored tensors."""

    sources: tuple[str, ...]
    combine: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None
    """None: the single source is the parameter."""


def load_units(
    model: PreTrainedModel,
    spec: StageRange,
    tensors: TensorSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Assign the parameters of a stage's units in a whole-model skeleton.

    Args:
        model: the model on the meta device, with its Hugging Face parameter names.
        spec: which units to fill.
        tensors: stored tensors; those of other stages are left alone.
        dtype: floating-point dtype of the parameters.
        device: where they live.

    Raises:
        InputError: tensors are missing, unknown, of a wrong shape or not floating point; all are named.
    """
    _refuse_unknown(tensors)
    apart = {name for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    recipes = _recipes(spec, tensors, apart=apart, is_tied=bool(model.config.tie_word_embeddings))
    expected = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False) if _owned(spec, name)}
    _compare_names(spec, expected=expected, found=recipes)
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    for name, recipe in recipes.items():
        own = None if is_expert_scale(name) else dtype
        value = _materialize(recipe, tensors, dtype=own, device=device, is_packed=_module(name) in packed)
        _check_shape(name, value, expected[name])
        _assign(model, name, value)
    for name, layer in packed.items():
        if _owned(spec, f"{name}.{SCALE}"):
            check_packed(name, layer)
    if spec.has_both_ends and model.config.tie_word_embeddings:
        _share_tied_table(model)


def _owned(spec: StageRange, name: str) -> bool:
    key = unit_of(name)
    return key is not None and spec.owns(key)


def _refuse_unknown(tensors: Iterable[str]) -> None:
    unknown = [name for name in tensors if unit_of(name) is None and not _STORED_BUFFER.fullmatch(name)]
    if unknown:
        raise InputError(
            f"{_count(unknown)} no part of the model uses: {_some(unknown)}",
            hint="this is not a checkpoint of the family its config.json names",
            code="E-TENSORS",
        )


def _recipes(spec: StageRange, tensors: Iterable[str], *, apart: Collection[str], is_tied: bool) -> dict[str, Recipe]:
    names = set(tensors)
    stored = sorted(name for name in names if _owned(spec, name))
    recipes = {name: Recipe((name,)) for name in stored if not (_EXPERT.fullmatch(name) or _ROUTER.fullmatch(name))}
    recipes |= _expert_recipes(stored, apart=apart)
    if spec.has_head and is_tied and HEAD not in names and EMBEDDING in names:
        recipes[HEAD] = Recipe((EMBEDDING,))
    return recipes


def _expert_recipes(names: Sequence[str], *, apart: Collection[str]) -> dict[str, Recipe]:
    """Files hold three matrices of each expert; the families' classes compute with those of all experts stacked.

    Packed ones are used as they lie: `apart` names the modules that hold such experts.
    """
    experts: dict[str, dict[str, dict[int, str]]] = {}
    recipes = {f"{m[1]}.mlp.gate.weight": Recipe((m[0],)) for m in map(_ROUTER.fullmatch, names) if m}
    for match in filter(None, map(_EXPERT.fullmatch, names)):
        module, part = f"{match[1]}mlp{match[2]}", STORED_PARTS.get(match[4], match[4])
        if module in apart or match[5] != "weight":
            recipes[f"{module}.{match[3]}.{part}.{match[5]}"] = Recipe((match[0],))
        else:
            experts.setdefault(module, {}).setdefault(part, {})[int(match[3])] = match[0]
    for module, table in experts.items():
        gate, up, down = ([n for _, n in sorted(table.get(part, {}).items())] for part in STORED_PARTS.values())
        recipes[f"{module}.gate_up_proj"] = Recipe((*gate, *up), _stack_gate_and_up)
        recipes[f"{module}.down_proj"] = Recipe(tuple(down), _stack)
    return recipes


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tuple(tensors))  # [experts, E, F]


def _stack_gate_and_up(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    num_experts = len(tensors) // 2
    gate, up = tensors[:num_experts], tensors[num_experts:]  # each [F, E]
    return torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])  # [experts, 2 F, E]


def _compare_names(spec: StageRange, *, expected: Iterable[str], found: Iterable[str]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise InputError(
            f"{_count(missing)} missing for {spec.words}: {_some(missing)}",
            hint="the checkpoint or bundle is incomplete; fetch or export it again",
            code="E-TENSORS",
        )
    if extra:
        raise InputError(
            f"{_count(extra)} the model has no place for: {_some(extra)}",
            hint="config.json does not describe these weights",
            code="E-TENSORS",
        )


def _materialize(
    recipe: Recipe, tensors: TensorSource, *, dtype: torch.dtype | None, device: torch.device, is_packed: bool
) -> torch.Tensor:
    parts = []
    for source in recipe.sources:
        tensor, as_stored = tensors[source], STORED.get(source.rpartition(".")[2]) if is_packed else None
        if tensor.dtype not in (as_stored or FLOAT_DTYPES):
            raise InputError(
                f"{printable(source)} is stored as {tensor.dtype}",
                expected=_dtype_words(as_stored) if as_stored else "float32, float16 or bfloat16",
                code="E-DTYPE",
            )
        parts.append(tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None))
    return parts[0] if recipe.combine is None else recipe.combine(parts)


def _dtype_words(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _check_shape(name: str, value: torch.Tensor, expected: torch.Size) -> None:
    if value.shape != expected:
        raise InputError(
            f"{printable(name)} has shape {list(value.shape)}, config.json says {list(expected)}", code="E-SHAPE"
        )


def _assign(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    is_packed = leaf in STORED
    # Parameters want gradients, as transformers leaves them: torch picks a matmul kernel by that flag (bmm or mm for
    # the sliced states before the head), and the two differ in the last bit even when no gradient is computed.
    # Those of compressed-tensors do not.
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=not is_packed))


def _share_tied_table(model: PreTrainedModel) -> None:
    """Let head and embedding use one storage, as transformers does when both hold the same values."""
    table, head = model.get_parameter(EMBEDDING), model.get_parameter(HEAD)
    if table.data_ptr() == head.data_ptr() or torch.equal(table, head):
        model.get_submodule(HEAD.rpartition(".")[0]).weight = table


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:4])
    return shown if len(names) <= 4 else f"{shown}, ..."
