"""Linear layers, multiplied natively: packed ones inside transformers' modules (prompts, and families that have no
kernels), and plain ones of bf16 in prompts where the processor has matrix tiles.

Up to MAX_ROWS rows are computed as the kernels' steps are. More rows meet weights that are unpacked to the numbers of
the reference path: in bf16 on tiles, else by torch, as many of them at a time as stay in the processor's cache.

Shapes: R rows, O outputs, I inputs.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional

from runtime.fast.native import DTYPES, MAX_ROWS, Library, Linear, Product
from runtime.reading.packed import PackedLinear

PACKED_COLUMNS = 32
"""Packed weights, and all on tiles, are multiplied by so many columns at a time; packed ones must share a scale."""

BLOCK_WEIGHTS = 1 << 21
"""So many are unpacked at a time: 4 MiB in bf16."""


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
        rows = inputs.reshape(-1, layer.in_features)
        if len(rows) > MAX_ROWS and not self._has_tiles_for(rows):
            found = self._by_blocks(layer, rows.contiguous())
        else:
            (found,) = self._multiply(rows, [(packed_addresses(layer), layer.out_features)])
        return found.view(*inputs.shape[:-1], layer.out_features)

    def linears(self, layers: Sequence[nn.Linear], inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return what layers, plain or packed, make of the rows [..., I] of a prompt on the CPU."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) <= MAX_ROWS or not (self._has_tiles_for(rows) and all(map(takes_groups, layers))):
            return [layer(inputs) for layer in layers]
        found = self._multiply(rows, [(linear_addresses(layer), layer.out_features) for layer in layers])
        return [part.view(*inputs.shape[:-1], -1) for part in found]

    def _has_tiles_for(self, rows: torch.Tensor) -> bool:
        return self._library.has_tiles and rows.dtype == torch.bfloat16 and rows.shape[1] % PACKED_COLUMNS == 0

    def _multiply(self, rows: torch.Tensor, weights: Sequence[tuple[Linear, int]]) -> list[torch.Tensor]:
        """Return rows [R, I] times weights of so many outputs each; more than one only on tiles."""
        rows, found = rows.contiguous(), [rows.new_empty(len(rows), outputs) for _, outputs in weights]
        products = [
            self._product(weight, result, columns=rows.shape[1], outputs=outputs)
            for (weight, outputs), result in zip(weights, found, strict=True)
        ]
        for product, after in zip(products, [*products[1:], None], strict=True):
            product.rows, product.inputs = len(rows), rows.data_ptr()
            product.also = 0 if after is None else ctypes.addressof(after)
        if len(rows):
            self._library.multiply_linear(products[0])
        return found

    def __deepcopy__(self, _memo: object) -> "Products":
        return self

    def unpack(self, layer: PackedLinear, *, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Return the weights [O, I], as `PackedLinear.unpack` does; or so many rows of them from `first` on."""
        num_rows = layer.out_features if count is None else count
        weight = torch.empty(num_rows, layer.in_features, dtype=layer.weight_scale.dtype)
        addresses = packed_addresses(layer, first=first)
        self._library.unpack_weights(self._product(addresses, weight, columns=layer.in_features, outputs=num_rows))
        return weight

    def _by_blocks(self, layer: PackedLinear, rows: torch.Tensor) -> torch.Tensor:
        found = rows.new_empty(len(rows), layer.out_features)
        size = max(BLOCK_WEIGHTS // layer.in_features, 1)
        for first in range(0, layer.out_features, size):
            weight = self.unpack(layer, first=first, count=min(size, layer.out_features - first))
            bias = None if layer.bias is None else layer.bias[first : first + len(weight)]
            found[:, first : first + len(weight)] = functional.linear(rows, weight, bias)
        return found

    def _product(self, weight: Linear, result: torch.Tensor, *, columns: int, outputs: int) -> Product:
        return Product(
            openmp=self._library.openmp_address,
            threads=torch.get_num_threads(),
            dtype=DTYPES[result.dtype],
            columns=columns,
            outputs=outputs,
            weight=weight,
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
