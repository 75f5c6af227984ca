"""How many experts a layer routes to and how many of them one token uses, under all the names in use."""

from plans.config.attention import Origin
from plans.config.fields import Fields, as_stated

TOTAL_KEYS = (
    "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts", "n_experts",
)  # fmt: skip
ACTIVE_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "num_active_experts", "moe_k", "moe_topk",
    "moe_top_k", "num_selected_experts", "n_experts_per_tok", "top_k_experts",
)  # fmt: skip
MAX_EXPERTS = 1 << 16


def read_experts(fields: Fields) -> tuple[int, int, tuple[Origin, ...]]:
    """Return (experts per layer, experts per token, origins); (0, 0, ()) for a dense model.

    Raises:
        InputError: two keys that contradict each other, or no key that says how many experts one token uses.
    """
    total_key, total = _one_of(fields, TOTAL_KEYS)
    if not total:
        return 0, 0, ()
    active_key, active = _one_of(fields, ACTIVE_KEYS)
    if not active:
        raise fields.error("num_experts_per_tok", f"is missing, and {total_key} says {total} experts")
    if active > total:
        raise fields.error(active_key, f"{active} is more than the {total} experts")
    how = f"one token reads {active_key} {active} of {total_key} {total}, and what all tokens share"
    return total, active, (Origin("decode_read_bytes", total_key, how),)


def _one_of(fields: Fields, names: tuple[str, ...]) -> tuple[str, int]:
    """The number that all spellings present agree on; 0 where there is none."""
    found = {name: _number(fields, name) for name in names if fields.raw.get(name) is not None}
    if not found:
        return names[0], 0
    first = next(iter(found))
    for name, value in found.items():
        if value != found[first]:
            raise fields.error(name, f"is {value}, {first} is {found[first]}", expected="one number")
    return first, found[first]


def _number(fields: Fields, name: str) -> int:
    """A number, or a list that says the same for every layer."""
    value = fields.raw[name]
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if type(value) is not int or not 0 <= value <= MAX_EXPERTS:
        found = f"is {as_stated(fields.raw[name])}"
        raise fields.error(name, found, expected=f"an integer from 0 to {MAX_EXPERTS}, the same for every layer")
    return value
