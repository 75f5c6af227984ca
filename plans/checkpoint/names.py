"""What a stored tensor is called in the model, and which unit owns it.

Every tensor has the name that transformers' text-only class gives it. People store others: trainers wrap modules, and
models of text and images keep the text part behind a name of its own. `canonical_names` takes those away.
"""

import re
from collections.abc import Iterable, Mapping

from plans.errors import InputError, printable

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
_OTHER_FINAL_NORMS = {
    "bamba": "model.final_layernorm.weight",
    "falcon_h1": "model.final_layernorm.weight",
    "jamba": "model.final_layernorm.weight",
    "lfm2": "model.embedding_norm.weight",
    "lfm2_moe": "model.embedding_norm.weight",
}
HEAD = "lm_head.weight"

UnitKey = tuple[str, int]
"""("embedding", 0), ("layer", i) or ("head", 0)."""

_OWNERS: Mapping[str, UnitKey] = {
    "model.embed_tokens.": ("embedding", 0),
    "model.norm.": ("head", 0),
    "model.final_layernorm.": ("head", 0),
    "model.embedding_norm.": ("head", 0),
    "lm_head.": ("head", 0),
}
"""A scale or a bias belongs to the unit of its weight, whatever the format calls it."""

_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.(.+)")
_IGNORED = re.compile(
    r".*rotary_emb\.inv_freq|.*\.rotary_emb\.cos_cached|.*\.rotary_emb\.sin_cached"
    r"|rope_(?:freqs|factors_long|factors_short)\.weight"  # as GGUF calls them
)

_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Left by torch.compile, FSDP and activation checkpointing, anywhere in a name."""
_OUTER = re.compile(r"(?:module\.|base_model\.model\.|thinker\.)*")
"""Left by data parallelism and by peft; the part of an Omni model that writes text."""
_TEXT_PART = re.compile(
    r"(?:model\.)?(?:language_model|text_model|language|llm)\.(?:model\.)?(?=(?:layers|embed_tokens|norm|lm_head)\.)"
)
_BASE = ("layers.", "embed_tokens.", "norm.")
_ADAPTER = re.compile(r".*\.(?:lora_[A-Za-z_]+|base_layer|modules_to_save)\..*")


def local_name(name: str) -> str:
    """Return a layer's tensor name without ``model.layers.N.``; other names unchanged."""
    match = _LAYER.fullmatch(name)
    return match.group(2) if match else name


def prefix_of(key: UnitKey) -> str:
    """Return what a unit's local names leave out: ``model.layers.N.`` of a layer, nothing of the others."""
    return f"model.layers.{key[1]}." if key[0] == "layer" else ""


def final_norm(model_type: str) -> str:
    """Return what a family calls the weight of its final norm."""
    return _OTHER_FINAL_NORMS.get(model_type, FINAL_NORM)


def is_leftover(name: str) -> bool:
    """Whether a tensor is a stored rotary table, which is computed anew."""
    return _IGNORED.fullmatch(name) is not None


def unit_of(name: str) -> UnitKey | None:
    """Return the unit that owns tensor `name`, or None for tensors no unit computes with.

    >>> unit_of("lm_head.weight_scale"), unit_of("model.layers.3.mlp.up_proj.weight"), unit_of("visual.proj")
    (('head', 0), ('layer', 3), None)
    """
    if is_leftover(name):
        return None
    match = _LAYER.fullmatch(name)
    if match:
        return ("layer", int(match.group(1)))
    return next((key for prefix, key in _OWNERS.items() if name.startswith(prefix)), None)


def head_name(name: str) -> str:
    """Return what a tied head calls a tensor of the embedding.

    >>> head_name("model.embed_tokens.weight_scale")
    'lm_head.weight_scale'
    """
    return "lm_head." + name.removeprefix("model.embed_tokens.")


def canonical_names(stored: Iterable[str], *, where: object) -> Mapping[str, str]:
    """Return stored name -> the name the model has for it.

    Names are left alone where the embedding lies under its own, but for what torch.compile and FSDP put in between.

    Raises:
        InputError: two tensors would get one name, or the weights of an adapter lie beside those it changes.

    Example:
        >>> dict(canonical_names(["base_model.model.model.norm.weight"], where="example"))
        {'base_model.model.model.norm.weight': 'model.norm.weight'}
    """
    unwrapped = {name: _WRAPPERS.sub("", name) for name in stored}
    is_usual = any(name.startswith("model.embed_tokens.") for name in unwrapped.values())
    found = unwrapped if is_usual else {name: _inner_name(text) for name, text in unwrapped.items()}
    owners: dict[str, str] = {}
    for name, canonical in found.items():
        if canonical in owners:
            raise InputError(
                f"{printable(owners[canonical])} and {printable(name)} are both {printable(canonical)}",
                where=where,
                hint="keep one of the two",
                code="E-DUPLICATE",
            )
        owners[canonical] = name
    _refuse_adapter(found, where)
    return found


def _inner_name(name: str) -> str:
    outer = _OUTER.match(name)
    inner = name[outer.end() :] if outer else name
    part = _TEXT_PART.match(inner)
    text = inner[part.end() :] if part else inner
    return f"model.{text}" if text.startswith(_BASE) else text


def _refuse_adapter(names: Mapping[str, str], where: object) -> None:
    found = next((name for name, canonical in names.items() if unit_of(canonical) and _ADAPTER.fullmatch(name)), None)
    if found is not None:
        raise InputError(
            f"{printable(found)} belongs to an adapter that was never merged into its model",
            where=where,
            hint="merge it with peft: model.merge_and_unload().save_pretrained(TARGET)",
            code="E-ADAPTER",
        )
