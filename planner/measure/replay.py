"""A model run again and again with other weights in some of its layers, from the first changed layer on.

Everything is computed in fp32, whatever the weights are stored in: rounding to bf16 alone moves the tokens' likelihoods
further than a layer in 8 bits does. A module's weights become fp32 while it runs, so that the model itself takes no
more memory than its file.

Shapes: N windows of S tokens, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from runtime.stages.chain import Chain

Changes = Mapping[str, Callable[[], torch.Tensor]]
"""Other weights by their names in the model, made when they are needed."""
ROWS = 64
"""Positions compared at once: in doubles a vocabulary is large."""
_NONE: Changes = {}


@dataclass(slots=True)
class _Window:
    """What the model as it is made of one window."""

    ids: torch.Tensor
    """[1, S]"""
    hidden: list[torch.Tensor] = field(default_factory=list)
    """What every layer is given, and what the last one hands on: [1, S, E]."""
    likely: torch.Tensor | None = None
    """Log-likelihood of every token [S, V]."""


class Replay:
    """A chain on one device, and some text that it has read as it is.

    Example:
        >>> replay = Replay(chain, torch.arange(64)[None])  # doctest: +SKIP
        >>> replay.divergence({"lm_head.weight": lambda: rounded}, first=replay.num_layers)  # doctest: +SKIP
        3.1e-05
    """

    def __init__(self, chain: Chain, windows: torch.Tensor) -> None:
        """Let the chain read the windows [N, S]."""
        self._chain = chain
        self._layers: list[nn.Module] = list(cast("Any", chain.base_model).layers)
        self._names = {module: name for name, module in chain.named_modules()}
        self._windows = [_Window(ids[None].to(chain.stage_devices[0])) for ids in windows]
        for window in self._windows:
            window.likely = self._read(window, _NONE, first=None)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the chain."""
        return len(self._layers)

    def divergence(self, changes: Changes, *, first: int) -> float:
        """Return the mean KL divergence per token from the chain as it is to the chain with other weights.

        Args:
            changes: the other weights.
            first: the first layer that has any; the number of layers where only the head has.
        """
        total, count = 0.0, 0
        for window in self._windows:
            assert window.likely is not None
            total += divergence(window.likely, self._read(window, changes, first=first))
            count += len(window.likely)
        return max(0.0, total / count)

    def _read(self, window: _Window, changes: Changes, *, first: int | None) -> torch.Tensor:
        """Return log-likelihoods [S, V]; with `first` None the hidden states are kept."""
        with torch.no_grad(), ExitStack() as stack:
            base: Any = self._chain.base_model
            for index, layer in enumerate(self._layers):
                if first is not None and index < first:
                    stack.enter_context(_skipped(layer, window.hidden[first]))
                else:
                    stack.enter_context(_in_fp32(layer, self._names[layer], changes))
                    stack.enter_context(_watched(layer, window.hidden) if first is None else ExitStack())
            stack.enter_context(_floating(base.embed_tokens))
            stack.enter_context(_in_fp32(base.norm, self._names[base.norm], changes))
            stack.enter_context(_watched(base.norm, window.hidden) if first is None else ExitStack())
            stack.enter_context(_in_fp32(cast("Any", self._chain).lm_head, "lm_head", changes))
            logits = cast("Any", self._chain)(window.ids, use_cache=False).logits
        return torch.log_softmax(logits[0], dim=-1)


def divergence(base: torch.Tensor, other: torch.Tensor) -> float:
    """Return the sum over positions of KL(base, other), both log-likelihoods [S, V]."""
    found = 0.0
    for p, q in zip(torch.split(base, ROWS), torch.split(other, ROWS), strict=True):
        wide = p.double()
        found += float((wide.exp() * (wide - q.double())).sum())
    return found


@contextmanager
def _skipped(layer: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    """Let a layer hand on given states instead of computing any."""
    layer.forward = lambda *_arguments, **_options: hidden
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def _in_fp32(module: nn.Module, name: str, changes: Changes) -> Iterator[None]:
    """Give a module its weights in fp32, or others, while it runs."""
    parameters = dict(module.named_parameters())

    def widen(*_: object) -> None:
        for own, parameter in parameters.items():
            other = changes.get(f"{name}.{own}")
            kept[own] = parameter.data
            parameter.data = parameter.data.float() if other is None else other().to(parameter.device).float()

    def restore(*_: object) -> None:
        for own, data in kept.items():
            parameters[own].data = data
        kept.clear()

    kept: dict[str, torch.Tensor] = {}
    with _hooked(module.register_forward_pre_hook(widen), module.register_forward_hook(restore)):
        try:
            yield
        finally:
            restore()


@contextmanager
def _watched(module: nn.Module, seen: list[torch.Tensor]) -> Iterator[None]:
    """Keep what a module is given."""

    def watch(_module: nn.Module, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        seen.append(arguments[0] if arguments else options["hidden_states"])

    with _hooked(module.register_forward_pre_hook(watch, with_kwargs=True)):
        yield


@contextmanager
def _floating(embedding: nn.Module) -> Iterator[None]:
    """Let an embedding hand on fp32."""
    with _hooked(embedding.register_forward_hook(lambda _module, _arguments, found: found.float())):
        yield


@contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
