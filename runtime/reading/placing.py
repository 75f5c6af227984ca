"""Where a skeleton of transformers' modules gets layers of ours, because files hold their weights packed."""

from torch import nn
from transformers import PreTrainedModel

from plans.errors import InputError, printable
from plans.packed.config import Packing
from plans.packed.scheme import Scheme
from runtime.reading.experts import PackedExperts, stored_module
from runtime.reading.packed import PackedLinear


def place_packed(model: PreTrainedModel, packing: Packing) -> None:
    """Put an empty `PackedLinear` in place of every linear layer of a skeleton that is stored packed.

    Experts are taken apart for it, where any matrix of theirs is packed.

    Raises:
        InputError: (E-QUANT) a matrix that its scheme cannot hold, or a tied head that is to be packed.
    """
    family = model.config.model_type
    for name in [name for name, _ in model.named_modules() if name.endswith(".experts")]:
        _take_apart(model, name, packing)
    for name, module in list(model.named_modules()):
        scheme = packing.scheme_of(stored_module(name, family)) if isinstance(module, nn.Linear) else None
        if scheme is None:
            continue
        assert isinstance(module, nn.Linear)
        _check_place(name, module, scheme, is_tied=name == "lm_head" and bool(model.config.tie_word_embeddings))
        model.set_submodule(name, PackedLinear(module, scheme))


def _take_apart(model: PreTrainedModel, name: str, packing: Packing) -> None:
    experts = PackedExperts(model.get_submodule(name))
    linear = [f"{name}.{inner}" for inner, module in experts.named_modules() if isinstance(module, nn.Linear)]
    if any(packing.scheme_of(stored_module(layer, model.config.model_type)) for layer in linear):
        model.set_submodule(name, experts)


def _check_place(name: str, linear: nn.Linear, scheme: Scheme, *, is_tied: bool) -> None:
    if is_tied:
        raise InputError(
            f"{name} shares the table of the embedding and is said to be {scheme.words}",
            where="config.json:/quantization_config",
            expected=f"{name} in the list 'ignore'",
            code="E-QUANT",
        )
    if not scheme.can_pack(linear.out_features, linear.in_features):
        raise InputError(
            f"{printable(name)} has {linear.in_features} columns, which {scheme.words} does not divide",
            where="config.json:/quantization_config",
            expected="whole groups of columns in whole words of 32 bits",
            code="E-QUANT",
        )
