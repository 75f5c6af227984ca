"""Names and shapes of tensors, before and after a model's weights were packed as its plan chose."""

from collections.abc import Iterator, Mapping

from plans.packed.choice import WeightChoice
from plans.packed.scheme import PACKED, PACKED_PARTS, SCALE, SHAPE, WORD_BITS, Scheme

Row = tuple[str, tuple[int, ...]]
"""Stored dtype and shape."""
_MATRIX = 2
_WEIGHT = ".weight"


def scheme_of_tensor(choice: WeightChoice | None, name: str, shape: tuple[int, ...]) -> Scheme | None:
    """Return how a stored tensor will be packed; None where it stays as it is.

    >>> choice = WeightChoice(kind="int4", layer_bits=(4,))
    >>> scheme_of_tensor(choice, "model.layers.0.mlp.up_proj.weight", (64, 32)).words
    'int4 g32'
    """
    if choice is None or len(shape) != _MATRIX or not name.endswith(_WEIGHT):
        return None
    return choice.scheme_of(name.removesuffix(_WEIGHT), out=shape[0], in_=shape[1])


def packed_rows(module: str, scheme: Scheme, shape: tuple[int, int], *, scale: str) -> Iterator[tuple[str, Row]]:
    """Yield names, dtypes and shapes of the three tensors of a packed module, in their order."""
    yield f"{module}.{PACKED}", ("I32", scheme.packed_shape(*shape))
    yield f"{module}.{SCALE}", (scale, scheme.scale_shape(*shape))
    yield f"{module}.{SHAPE}", ("I64", (2,))


def original_rows(rows: Mapping[str, Row], choice: WeightChoice, *, scale: str) -> dict[str, Row]:
    """Return the tensors as they were before they were packed; packed ones take the scales' dtype.

    Args:
        rows: tensors of a packed model, by their full names.
        choice: what its plan chose.
        scale: the stored dtype the scales must have.

    Raises:
        KeyError: of the name of a tensor that is not what the choice makes of its module.
    """
    found = {name: row for name, row in rows.items() if name.rpartition(".")[2] not in PACKED_PARTS}
    for name, (_dtype, shape) in found.items():
        if scheme_of_tensor(choice, name, shape) is not None:
            raise KeyError(name)
    for name in rows.keys() - found.keys():
        module = name.rpartition(".")[0]
        found[module + _WEIGHT] = scale, _original_shape(module, rows, choice, scale=scale)
    return found


def _original_shape(module: str, rows: Mapping[str, Row], choice: WeightChoice, *, scale: str) -> tuple[int, int]:
    name = f"{module}.{PACKED}"
    _, shape = rows.get(name, ("", ()))
    for bits in (4, 8):
        if len(shape) != _MATRIX:
            break
        original = shape[0], shape[1] * WORD_BITS // bits
        scheme = scheme_of_tensor(choice, module + _WEIGHT, original)
        if scheme is not None and scheme.bits == bits:
            if any(rows.get(part) != row for part, row in packed_rows(module, scheme, original, scale=scale)):
                break
            return original
    raise KeyError(name)
