"""`quantization_config` of a packed checkpoint -> how each linear layer is stored, and back.

What is read is compressed-tensors' `pack-quantized`: whole numbers of 4 or 8 bits, symmetric, one scale per group of
columns or per row, activations left alone. Everything else is refused by its key: a setting that was overlooked would
give wrong numbers, not an error. Which group a layer belongs to follows `compressed_tensors.utils.match`: `ignore`
wins, then an exact name, then a pattern, then the class.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from plans.errors import InputError, printable
from plans.packed.patterns import PREFIX, compile_patterns
from plans.packed.scheme import Scheme, is_linear

WHERE = "config.json:/quantization_config"
METHOD, FORMAT, MIXED_FORMAT = "compressed-tensors", "pack-quantized", "mixed-precision"
CLASS = "Linear"
MAX_GROUP_SIZE = 4096
_WEIGHT_GROUP = 32
_UNUSED = ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config")
"""Tables that change what is computed; an empty one, or null, changes nothing."""
_NO_ORDER = (None, False, "weight", "static")
"""Orders of activations that leave no trace in the file."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How the linear layers of a checkpoint are stored."""

    exact: Mapping[str, Scheme]
    """By the name of the module."""
    patterns: tuple[tuple[re.Pattern[str], Scheme], ...]
    """In the order in which they are tried."""
    rest: Scheme | None
    """Of every other linear layer."""
    ignored: frozenset[str]
    ignored_patterns: tuple[re.Pattern[str], ...]

    def scheme_of(self, module: str) -> Scheme | None:
        """Return how a module's weights are stored; None where they are stored as they are."""
        if not is_linear(module) or not self.ignored.isdisjoint((module, CLASS)):
            return None
        if any(pattern.match(module) for pattern in self.ignored_patterns):
            return None
        found = self.exact.get(module)
        return found or next((scheme for pattern, scheme in self.patterns if pattern.match(module)), self.rest)

    @property
    def words(self) -> str:
        """The schemes it names, such as `int4 g32 and int8 g32`."""
        schemes = {*self.exact.values(), *(scheme for _, scheme in self.patterns), *filter(None, [self.rest])}
        return " and ".join(sorted(scheme.words for scheme in schemes))


def read_packing(raw: Mapping[str, Any]) -> Packing | None:
    """Read the `quantization_config` of a parsed `config.json`; None where there is none.

    Raises:
        InputError: (E-QUANT) weights of another format, or a setting that is not understood.
    """
    table = raw.get("quantization_config")
    if table is None:
        return None
    if not isinstance(table, dict):
        raise _refused("", table, "a table")
    _check_format(table)
    groups = table.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refused("config_groups", groups, "at least one group")
    schemes: dict[str, Scheme] = {}  # of equal targets the last group's counts
    for name, group in groups.items():
        at = f"config_groups/{printable(name, limit=40)}"
        scheme = _read_group(group, at, needs_format=table["format"] == MIXED_FORMAT)
        schemes |= dict.fromkeys(_texts(group.get("targets"), f"{at}/targets"), scheme)
    return _packing(schemes, _texts(table.get("ignore") or [], "ignore"))


def _packing(schemes: Mapping[str, Scheme], ignore: list[str]) -> Packing:
    texts = sorted(target for target in schemes if target.startswith(PREFIX))
    patterns = compile_patterns(texts, where=f"{WHERE}/config_groups")
    return Packing(
        exact={target: schemes[target] for target in schemes.keys() - {CLASS, *texts}},
        patterns=tuple(zip(patterns, map(schemes.__getitem__, texts), strict=True)),
        rest=schemes.get(CLASS),
        ignored=frozenset(ignore),
        ignored_patterns=compile_patterns(ignore, where=f"{WHERE}/ignore"),
    )


def quantization_config(schemes: Mapping[str, Scheme], *, ignore: Iterable[str] = ("lm_head",)) -> dict[str, Any]:
    """Return the `quantization_config` of a model whose modules are stored so.

    Args:
        schemes: module name -> how it is stored; at least one.
        ignore: every linear layer that is left as it is.
    """
    kinds = sorted(set(schemes.values()), key=lambda scheme: (scheme.bits, scheme.group_size or 0))
    members = {kind: [module for module in sorted(schemes) if schemes[module] == kind] for kind in kinds}
    targets = {kinds[0]: [CLASS]} if len(kinds) == 1 else members
    return {
        "quant_method": METHOD,
        "format": FORMAT if len(kinds) == 1 else MIXED_FORMAT,
        "quantization_status": "compressed",
        # Padded, because compressed-tensors sorts groups by their names as texts.
        "config_groups": {f"group_{i:02}": _group(kind, targets[kind]) for i, kind in enumerate(kinds)},
        "ignore": sorted(set(ignore) - schemes.keys()),
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {"targets": targets, "format": FORMAT, "weights": weights}


def _check_format(table: Mapping[str, Any]) -> None:
    method, kind, status = (table.get(key) for key in ("quant_method", "format", "quantization_status"))
    if method != METHOD:
        raise _refused("quant_method", method, METHOD)
    if kind not in (FORMAT, MIXED_FORMAT):
        raise _refused("format", kind, FORMAT)
    if status != "compressed":
        raise _refused("quantization_status", status, "compressed")
    for key in _UNUSED:
        if table.get(key):
            raise _refused(key, table[key], "none")


def _read_group(group: Any, at: str, *, needs_format: bool) -> Scheme:
    if not isinstance(group, dict):
        raise _refused(at, group, "a table with targets and weights")
    own_format = group.get("format")
    if own_format != FORMAT and (own_format is not None or needs_format):
        raise _refused(f"{at}/format", own_format, FORMAT)
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise _refused(f"{at}/{key}", group[key], "none: only weights are packed")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise _refused(f"{at}/weights", weights, "a table")
    return _read_weights(weights, f"{at}/weights")


def _read_weights(weights: Mapping[str, Any], at: str) -> Scheme:
    bits = weights.get("num_bits", 8)
    if type(bits) is not int or bits not in (4, 8):
        raise _refused(f"{at}/num_bits", bits, "4 or 8")
    if not _is_text(weights.get("type", "int"), "int"):
        raise _refused(f"{at}/type", weights["type"], "int")
    if weights.get("symmetric", True) is not True:
        raise _refused(f"{at}/symmetric", weights["symmetric"], "true: zero points are not read")
    if weights.get("dynamic", False) is not False:
        raise _refused(f"{at}/dynamic", weights["dynamic"], "false")
    if weights.get("actorder") not in _NO_ORDER:
        raise _refused(f"{at}/actorder", weights["actorder"], "none: columns are read in their own order")
    for key in ("block_structure", "scale_dtype"):
        if weights.get(key) is not None:
            raise _refused(f"{at}/{key}", weights[key], "none")
    return Scheme(4 if bits == 4 else 8, _group_size(weights, at))


def _group_size(weights: Mapping[str, Any], at: str) -> int | None:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if _is_text(strategy, "channel") and (size is None or size == -1):
        return None
    if not _is_text(strategy, "group"):
        raise _refused(f"{at}/strategy", strategy, "group, or channel without a group_size")
    if type(size) is not int or not 0 < size <= MAX_GROUP_SIZE or size % _WEIGHT_GROUP:
        raise _refused(f"{at}/group_size", size, f"a multiple of {_WEIGHT_GROUP} up to {MAX_GROUP_SIZE}")
    return size


def _is_text(value: Any, text: str) -> bool:
    return isinstance(value, str) and value.lower() == text


def _texts(value: Any, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _refused(key, value, "a list of names")
    return value


def _refused(key: str, value: Any, expected: str) -> InputError:
    return InputError(
        f"quantised weights with {key.rpartition('/')[2] or 'quantization_config'} {printable(value, limit=60)} "
        "are not understood",
        where=f"{WHERE}/{key}".rstrip("/"),
        expected=expected,
        hint="analyze and solve still size the model; to run it here, take its bf16 original",
        code="E-QUANT",
    )
