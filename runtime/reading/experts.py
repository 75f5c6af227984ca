"""Routed experts of which some matrix is packed: unpacked one expert at a time, when tokens are sent to it.

transformers holds the experts of a layer in two tensors, files hold three matrices of each. What is computed is
transformers' `grouped_mm` (`transformers.integrations.moe`), expert by expert and bit for bit.

Shapes: T tokens, K experts of each, S = T * K rows, R rows of one expert, E hidden size, F rows of an expert's gate.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from runtime.reading.packed import PackedLinear

Layer = nn.Linear | PackedLinear
STORED_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""What Mixtral's files call the matrices of an expert -> what they are called here, and in files of other families."""
_FILE_PARTS = {part: stored for stored, part in STORED_PARTS.items()}


class Unread(nn.Linear):
    """A linear layer without first numbers, which take half the time of a skeleton of thousands of experts."""

    def reset_parameters(self) -> None:
        """Leave the weights to those who read them."""


class Expert(nn.Module):
    """One expert; each of its three matrices is a `PackedLinear` or, where it is not packed, an `nn.Linear`."""

    def __init__(self, hidden_size: int, inner_size: int, act_fn: nn.Module) -> None:
        """Make an empty expert (on the meta device)."""
        super().__init__()
        self.gate_proj: Layer = Unread(hidden_size, inner_size, bias=False, device="meta")
        self.up_proj: Layer = Unread(hidden_size, inner_size, bias=False, device="meta")
        self.down_proj: Layer = Unread(inner_size, hidden_size, bias=False, device="meta")
        self.act_fn = act_fn

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what the expert makes of rows [R, E], [R, E]."""
        gate, up = self._gate_and_up(rows)  # [R, F] each
        hidden = self.act_fn(gate) * up
        found: torch.Tensor = self.down_proj(hidden.to(_dtype(self.down_proj)))
        return found

    def _gate_and_up(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = rows.to(_dtype(self.gate_proj))
        if isinstance(self.gate_proj, PackedLinear) and self.gate_proj.product is not None:
            return self.gate_proj(rows), self.up_proj(rows)
        # One product of both, as in transformers: torch may choose its kernel by the shape.
        both = torch.cat([_weight(self.gate_proj, rows.dtype), _weight(self.up_proj, rows.dtype)])  # [2 F, E]
        gate, up = functional.linear(rows, both).chunk(2, dim=-1)
        return gate, up


class PackedExperts(nn.ModuleList):
    """The experts of a layer, in place of transformers' own module for them."""

    def __init__(self, experts: Any) -> None:
        """Make empty experts (on the meta device) of the shapes of transformers' `experts`."""
        sizes = (experts.hidden_dim, experts.intermediate_dim)
        super().__init__(Expert(*sizes, experts.act_fn) for _ in range(experts.num_experts))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of what every token's experts make of it.

        Args:
            hidden_states: [T, E].
            top_k_index: [T, K], numbers of experts.
            top_k_weights: [T, K].
        """
        numbers, order = torch.sort(top_k_index.reshape(-1))  # [S], not stable, so done as it is there
        counts = torch.bincount(numbers, minlength=len(self)).tolist()
        rows = torch.split(hidden_states[order // top_k_index.shape[-1]], counts)  # [R, E] for every expert
        found = torch.cat([expert(own) for expert, own in zip(self, rows, strict=True) if len(own)])  # [S, E]
        weighted = found * top_k_weights.reshape(-1)[order, None]
        by_token = torch.empty_like(weighted).index_copy_(0, order, weighted)
        return by_token.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)


def compute_experts_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let packed experts be computed in a dtype of their own, where it is not transformers that they shall equal."""
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.to(dtype)


def stored_module(name: str, model_type: str) -> str:
    """Return what files call a linear layer of the model.

    >>> stored_module("model.layers.0.mlp.experts.3.up_proj", "mixtral")
    'model.layers.0.block_sparse_moe.experts.3.w3'
    """
    outer, _, part = name.rpartition(".")
    if model_type != "mixtral" or ".mlp.experts." not in name:
        return name
    return f"{outer.replace('.mlp.', '.block_sparse_moe.')}.{_FILE_PARTS[part]}"


def stored_experts(*, model_type: str, num_layers: int, num_experts: int) -> Iterator[str]:
    """Yield what files call the matrices of all experts."""
    for layer, expert, part in itertools.product(range(num_layers), range(num_experts), _FILE_PARTS):
        yield stored_module(f"model.layers.{layer}.mlp.experts.{expert}.{part}", model_type)


def _dtype(layer: Layer) -> torch.dtype:
    """What transformers computes an expert in: the dtype its scales are stored in, whatever that of the model."""
    return (layer.weight_scale if isinstance(layer, PackedLinear) else layer.weight).dtype


def _weight(layer: Layer, dtype: torch.dtype) -> torch.Tensor:
    return layer.unpack(dtype) if isinstance(layer, PackedLinear) else layer.weight
