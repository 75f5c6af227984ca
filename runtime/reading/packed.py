"""Linear layers whose weights stay packed: unpacked for a moment, every time they are used.

The numbers are those of transformers with compressed-tensors, bit for bit: the whole number times its scale, both in
the dtype of the model, rounded once. The packed numbers stay what the file holds (on a CPU: mapped), and so do scales
that are stored in the dtype of the model.

Shapes: O rows, I columns, G groups of columns per row.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from plans.errors import InputError, printable
from plans.packed.scheme import PACKED, SCALE, SHAPE, Scheme

STORED = {PACKED: (torch.int32,), SCALE: (torch.bfloat16, torch.float16, torch.float32), SHAPE: (torch.int64,)}
"""What the three tensors of a packed layer may be stored as."""
_VALUES_AT_ONCE = 1 << 20
"""So many weights are unpacked at a time: what lies between packed and unpacked then stays in the processor."""


class PackedLinear(nn.Module):
    """A linear layer with packed weights, in place of an `nn.Linear`.

    Attributes:
        scheme: how they are packed.
        weight_packed: int32 [O, I * bits / 32].
        weight_scale: [O, G] in the dtype of the model.
        weight_shape: int64 [2], O and I as the file says them.
        bias: [O] in the dtype of the model, or None.
        product: native code that multiplies, where it returns something; None on the reference path.
    """

    product: "Callable[[PackedLinear, torch.Tensor], torch.Tensor | None] | None" = None

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        """Make an empty layer (on the meta device) of the shape of `linear`, whose bias it takes over."""
        super().__init__()
        self.scheme = scheme
        self.in_features, self.out_features = linear.in_features, linear.out_features
        sides = (self.out_features, self.in_features)
        self.weight_packed = _empty(scheme.packed_shape(*sides), torch.int32)
        self.weight_scale = _empty(scheme.scale_shape(*sides), torch.float32)
        self.weight_shape = _empty((2,), torch.int64)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs [..., I] times the weights, [..., O]."""
        found = self.product(self, inputs) if self.product is not None else None
        return functional.linear(inputs, self.unpack(inputs.dtype), self.bias) if found is None else found

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights [O, I] as numbers of `dtype`."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight_packed.device)
        num_rows = max(1, _VALUES_AT_ONCE // self.in_features)
        with torch.no_grad():
            scales = self.weight_scale.to(dtype)[..., None]  # [O, G, 1]
            for rows in (slice(start, start + num_rows) for start in range(0, self.out_features, num_rows)):
                numbers = unpack_numbers(self.weight_packed[rows], self.scheme.bits)
                grouped = (len(numbers), scales.shape[1], -1)
                torch.mul(numbers.view(grouped), scales[rows], out=weight[rows].view(grouped))
        return weight

    def extra_repr(self) -> str:
        """Say shape and scheme where the model is printed."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.words}"


def unpack_numbers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return whole numbers [O, I] as int8 from words [O, I * bits / 32] that hold them + 2^(bits - 1)."""
    data = packed.view(torch.uint8)  # [O, I * bits / 8]
    if bits == 8:
        return data.bitwise_xor(0x80).view(torch.int8)
    halves = torch.stack((data & 0xF, data >> 4), dim=-1)
    return halves.view(len(packed), -1).view(torch.int8) - 8


def check_packed(name: str, layer: PackedLinear) -> None:
    """Require that a loaded layer holds what its scheme says: the two sides, and finite scales.

    Raises:
        InputError: (E-SHAPE, E-SCALES) naming the tensor.
    """
    sides = [layer.out_features, layer.in_features]
    if layer.weight_shape.tolist() != sides:
        raise InputError(
            f"{printable(name)}.{SHAPE} says {layer.weight_shape.tolist()}, config.json says {sides}", code="E-SHAPE"
        )
    wrong = ~layer.weight_scale.isfinite()
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        raise InputError(
            f"{printable(name)}.{SCALE} holds {layer.weight_scale[row, group].item()} in row {row}, group {group}",
            expected=f"finite numbers as {str(layer.weight_scale.dtype).removeprefix('torch.')}",
            hint="the file is damaged; fetch or export it again",
            code="E-SCALES",
        )


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
