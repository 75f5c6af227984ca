"""Packed linear layers, multiplied natively inside transformers' modules: in families that have no kernels.

Shapes: R rows, O outputs, I inputs.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from runtime.fast.native import DTYPES, MANY_ROWS, Library, Linear, Product
from runtime.reading.packed import PackedLinear

PACKED_COLUMNS = 32
"""So many columns of packed weights must share a scale."""


class Products:
    """What `PackedLinear.product` calls.

    Example:
        >>> attach([model], kernels)  # doctest: +SKIP
    """

    def __init__(self, library: Library) -> None:
        """Multiply with this library."""
        self._library = library

    def __call__(self, layer: PackedLinear, inputs: torch.Tensor) -> torch.Tensor | None:
        """Return inputs [..., I] times the weights, [..., O], or None where this is nothing for native code."""
        if inputs.device.type != "cpu" or inputs.dtype != layer.weight_scale.dtype or torch.is_grad_enabled():
            return None
        rows = inputs.reshape(-1, layer.in_features).contiguous()
        found = rows.new_empty(len(rows), layer.out_features)
        for first in range(0, len(rows), MANY_ROWS):
            part = slice(first, first + MANY_ROWS)
            self._library.multiply_linear(self._product(layer, rows[part], found[part]))
        return found.view(*inputs.shape[:-1], layer.out_features)

    def __deepcopy__(self, _memo: object) -> "Products":
        return self

    def _product(self, layer: PackedLinear, rows: torch.Tensor, result: torch.Tensor) -> Product:
        return Product(
            openmp=self._library.openmp_address,
            threads=torch.get_num_threads(),
            dtype=DTYPES[result.dtype],
            rows=len(rows),
            columns=layer.in_features,
            outputs=layer.out_features,
            inputs=rows.data_ptr(),
            weight=packed_addresses(layer),
            result=result.data_ptr(),
        )


def attach(modules: Iterable[nn.Module], library: Library) -> None:
    """Let the packed layers of some modules be multiplied natively, wherever transformers' code calls them."""
    products = Products(library)
    for layer in filter(takes_groups, packed_layers(modules)):
        layer.product = products


def has_packed(modules: Iterable[nn.Module]) -> bool:
    """Return whether any layer of some modules is packed."""
    return any(True for _ in packed_layers(modules))


def packed_layers(modules: Iterable[nn.Module]) -> Iterator[PackedLinear]:
    """Yield the packed layers of some modules."""
    return (layer for module in modules for layer in module.modules() if isinstance(layer, PackedLinear))


def takes_groups(layer: nn.Linear | PackedLinear) -> bool:
    """Return whether native code can read the scales of a layer, if it has any."""
    if not isinstance(layer, PackedLinear):
        return True
    return (layer.scheme.group_size or layer.in_features) % PACKED_COLUMNS == 0


def linear_addresses(layer: nn.Linear | PackedLinear, *, first: int = 0) -> Linear:
    """Return where a linear layer is, from row `first` on."""
    if isinstance(layer, PackedLinear):
        return packed_addresses(layer, first=first)
    return Linear(weight=layer.weight[first].data_ptr(), bias=layer.bias.data_ptr() if layer.bias is not None else 0)


def packed_addresses(layer: PackedLinear, *, first: int = 0) -> Linear:
    """Return where a packed layer is, from row `first` on."""
    return Linear(
        weight=layer.weight_packed[first].data_ptr(),
        scale=layer.weight_scale[first].data_ptr(),
        bias=layer.bias.data_ptr() if layer.bias is not None else 0,
        bits=layer.scheme.bits,
        group=layer.scheme.group_size or layer.in_features,
    )
