"""Which tensors of a layer hold routed experts: by name, or as one tensor over all experts."""

import re
from collections.abc import Mapping

from plans.config.config import ModelConfig
from plans.errors import InputError, printable

Shape = tuple[int, ...]
_NUMBERED = re.compile(r"(?:^|.*\.)experts\.([0-9]+)\..*")
_UNCOUNTED = re.compile(r"(?:^|.*[._])(?<!shared_)experts?_?[0-9]+\..*")
_TOGETHER = re.compile(r"(?:^|.*\.)experts\..*")
MATRIX = 2


def is_expert(name: str, shape: Shape, config: ModelConfig) -> bool:
    """Return whether a layer's tensor belongs to routed experts; shared ones (`shared_experts.`) are read always."""
    if _TOGETHER.fullmatch(name):
        return True
    return config.num_experts > 1 and _is_stack(shape) and shape[0] == config.num_experts


def check_experts(shapes: Mapping[str, Shape], config: ModelConfig, *, where: object) -> bool:
    """Check a layer's experts against the configuration; return whether it has any.

    Raises:
        InputError: another number of experts than the configuration says, or tensors of some under another name.
    """
    numbered = {int(match.group(1)) for name in shapes if (match := _NUMBERED.fullmatch(name))}
    if numbered and (len(numbered) != config.num_experts or max(numbered) >= config.num_experts):
        raise _other_number(f"the tensors of {len(numbered)} experts", config, where)
    together = [n for n, s in shapes.items() if not _NUMBERED.fullmatch(n) and is_expert(n, s, config)]
    for name in together:
        if not shapes[name] or shapes[name][0] != config.num_experts:
            raise _other_number(f"{printable(name)} of shape {list(shapes[name])}", config, where)
    odd = sorted(n for n, s in shapes.items() if not is_expert(n, s, config) and _is_odd(n, s, config))
    if odd:
        what = f"holds {printable(odd[0])} of shape {list(shapes[odd[0]])}, which seems to belong to experts"
        raise InputError(what, where=where, hint="this model cannot be sized here", code="E-EXPERTS")
    return bool(numbered or together)


def _is_odd(name: str, shape: Shape, config: ModelConfig) -> bool:
    """A numbered expert under another name, or beside experts a stack of as many matrices as there are none of."""
    return bool(_UNCOUNTED.fullmatch(name)) or (config.num_experts > 1 and _is_stack(shape))


def _is_stack(shape: Shape) -> bool:
    """Matrices in one tensor; a convolution has one row for every channel."""
    return len(shape) > MATRIX and shape[1] > 1


def _other_number(found: str, config: ModelConfig, where: object) -> InputError:
    return InputError(
        f"holds {found}, config.json says {config.num_experts} experts",
        where=where,
        expected="one of num_local_experts, num_experts, n_routed_experts, moe_num_experts that agrees",
        code="E-EXPERTS",
    )
