"""The CPU fast path: steps of a stage in one native call, on the weights where they are; prompts layer by layer.

Transformers and kernels extend one and the same cache (`runtime.fast.cache`). Values are rounded where the
reference rounds them, only the order of sums differs: greedy tokens are the same up to ties within that rounding.

Shapes: B sequences, S new tokens, R rows of a ragged step, N slots, K key/value heads, C tokens of a slot, E hidden
size, D head size, V vocabulary.
"""

import ctypes
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from runtime.fast.cache import FastLayer
from runtime.fast.native import (
    DTYPES,
    MAX_HEAD_DIM,
    MAX_ROWS,
    Head,
    Layer,
    Library,
    Linear,
    Piece,
    Shape,
    Step,
)
from runtime.fast.passage import Passage, attend
from runtime.fast.products import PACKED_COLUMNS, linear_addresses, packed_layers, takes_groups
from runtime.fast.slots import Buffers, Places
from runtime.reading.packed import PackedLinear

FAMILIES = ("granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""`model_type`s whose layers the kernels compute."""

_Call = TypeVar("_Call", Step, Head)

_WINDOW_FOR_ALL = ("mistral", "phi3")  # their one `sliding_window` holds for every layer


def supports(config: PreTrainedConfig) -> str | None:
    """Return why the kernels cannot run models of this configuration, or None if they can."""
    if config.model_type not in FAMILIES:
        return f"there is no native kernel for {config.model_type}"
    if config.hidden_act not in ("silu", "swish"):
        return f"there is no native kernel for the activation {config.hidden_act}"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim > MAX_HEAD_DIM:
        return f"the native kernels take heads of up to {MAX_HEAD_DIM} values; this model's have {head_dim}"
    return None


def supports_weights(modules: Sequence[nn.Module]) -> str | None:
    """Return why the kernels cannot read the weights of these modules, or None if they can."""
    packed = list(packed_layers(modules))
    inside = {id(weight) for layer in packed for weight in layer.parameters() if weight is not layer.bias}
    weights = [weight for module in modules for weight in module.parameters()]
    kinds = {(weight.device.type, weight.dtype) for weight in weights if id(weight) not in inside}
    if len(kinds) > 1:
        return f"the stage mixes devices or dtypes: {', '.join(sorted(f'{d} {t}' for d, t in kinds))}"
    if any(device != "cpu" or dtype not in DTYPES for device, dtype in kinds):
        return "the native kernels take float32, float16 or bfloat16 weights on a CPU"
    if not all(weight.is_contiguous() for weight in weights):
        return "weights are not stored row by row"
    return next(filter(None, map(_supports_packed, packed)), None)


def _supports_packed(layer: PackedLinear) -> str | None:
    if not takes_groups(layer):
        size = layer.scheme.group_size or layer.in_features
        return f"the native kernels take a multiple of {PACKED_COLUMNS} columns to a scale; here are {size}"
    return None


class FastStage:
    """Decoder layers, and where the stage has it the head, computed by the native kernels.

    The modules keep owning the weights; they must not be moved or replaced while this object is used.

    Example:
        >>> stage = FastStage(kernels, model.model.layers, model.config)  # doctest: +SKIP
        >>> hidden = stage.decode(hidden, cos, sin, start=start, cache=cache.layers)  # doctest: +SKIP
    """

    def __init__(
        self,
        library: Library,
        layers: Sequence[nn.Module],
        config: PreTrainedConfig,
        *,
        norm: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> None:
        """Record where the weights are.

        Args:
            library: the compiled kernels.
            layers: transformers decoder layers; may be empty.
            config: their configuration; `supports(config)` must be None, and `supports_weights` of all modules too.
            norm: the final norm, if the stage has the head.
            head: the `lm_head`, if the stage has it.
        """
        self._library = library
        self._lock = threading.Lock()
        ends = (module for module in (norm, head) if module is not None)
        self._modules: tuple[Any, ...] = (*layers, *ends)  # keeps the weights alive
        self._layers = (Layer * len(layers))(*(_layer(layer, config) for layer in layers))
        first: Any = norm if norm is not None else layers[0].input_layernorm
        self._dtype: torch.dtype = first.weight.dtype
        self._shape = _shape(layers[0] if len(layers) else None, config, self._dtype)
        self._norm: Any = norm
        self._head: Any = head
        self._logits_scaling = float(getattr(config, "logits_scaling", 1.0))
        self._scratch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._calls: dict[tuple[type[Step] | type[Head], int, int, int], Any] = {}
        self._bound: list[weakref.ref[torch.Tensor]] = []  # weak: an old cache is free to go
        self._capacity = 0

    @torch.no_grad()
    def decode(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        start: torch.Tensor,
        cache: Sequence[FastLayer],
        threads: int | None = None,
    ) -> torch.Tensor:
        """Run S new tokens of every sequence through the layers and extend the cache by them.

        Args:
            hidden: [B, S, E].
            cos: rotary table [B or 1, S, rotary_dim] for the tokens' positions, as the model's `rotary_emb` makes it.
            sin: like `cos`.
            start: [B] int64, the first slot of each sequence that is not (left) padding.
            cache: one layer per decoder layer, all filled to the same length.
            threads: None takes torch's number.

        Returns:
            Hidden states [B, S, E].
        """
        batch, new_tokens, _ = hidden.shape
        if not self._layers or batch == 0 or new_tokens == 0:
            return hidden
        assert start.shape == (batch,)
        cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
        outputs, first = torch.empty_like(hidden), start.tolist()
        with self._lock:
            self._make_room(cache, batch=batch, new_tokens=new_tokens)
            for tokens in _slices(new_tokens, MAX_ROWS):
                width, past = tokens.stop - tokens.start, cache[0].length + tokens.start
                for part in _slices(batch, MAX_ROWS // width):
                    pieces = [
                        Piece(
                            sequence=sequence, first_row=row * width, num_rows=width, past=past, start=first[sequence]
                        )
                        for row, sequence in enumerate(range(part.start, part.stop))
                    ]
                    rows = (table[part, tokens] for table in (hidden, cos, sin))
                    outputs[part, tokens] = self._run(*rows, pieces=pieces, threads=threads)
        for layer in cache:
            layer.length += new_tokens
        return outputs

    @torch.no_grad()
    def read(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        masks: Mapping[bool, torch.Tensor | None],
        cache: Sequence[FastLayer],
    ) -> torch.Tensor:
        """Do what `decode` does with products of many rows and torch's attention, which read prompts faster.

        Args:
            hidden: [B, S, E].
            cos: rotary table [B or 1, S, rotary_dim] for the tokens' positions, as the model's `rotary_emb` makes it.
            sin: like `cos`.
            masks: by "has a window", as transformers makes them for its attention.
            cache: one layer per decoder layer, all filled to the same length.

        Returns:
            Hidden states [B, S, E].
        """
        batch, new_tokens, _ = hidden.shape
        if not self._layers or batch == 0 or new_tokens == 0:
            return hidden
        with self._lock:
            self._make_room(cache, batch=batch, new_tokens=new_tokens)
            past, rows = cache[0].length, batch * new_tokens
            pieces = [
                Piece(sequence=sequence, first_row=sequence * new_tokens, num_rows=new_tokens, past=past)
                for sequence in range(batch)
            ]
            cos, sin = (table.expand(batch, -1, -1).reshape(rows, -1) for table in (cos, sin))
            passage = self._passage(hidden.reshape(rows, -1), cos, sin, pieces=pieces)
            for entry, module, kept in zip(self._layers, self._modules, cache, strict=False):
                queries = passage.begin(entry).view(batch, new_tokens, -1, module.self_attn.head_dim)
                kept.length += new_tokens
                passage.finish(entry, attend(module.self_attn, queries, kept, masks[bool(entry.window)]))
            return passage.end().view_as(hidden)

    def _passage(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pieces: Sequence[Piece]
    ) -> Passage:
        assert hidden.dtype == self._dtype
        self._shape.rotary_dim = cos.shape[-1]
        tables = tuple(table.to(self._dtype).contiguous() for table in (cos, sin))
        return Passage(self._library, self._shape, hidden, tables, pieces=pieces, capacity=self._capacity)

    def ragged(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        places: Places,
        threads: int | None = None,
    ) -> torch.Tensor:
        """Run one new token of each of R sequences through the stage and write its keys and values.

        Args:
            hidden: [R, 1, E].
            cos: rotary table [R, 1, rotary_dim] for the tokens' positions.
            sin: like `cos`.
            places: where the sequences are in a cache.
            threads: None takes torch's number.

        Returns:
            Hidden states [R, 1, E], or logits [R, 1, V] from the head.
        """
        slots, lengths = places.slots, places.lengths
        threads, has_head = threads or torch.get_num_threads(), self._head is not None
        if not self._layers or not slots:
            return self.head(hidden, threads=threads) if has_head else hidden
        assert len(set(slots)) == len(hidden)
        outputs = []
        with self._lock:
            self._bind(places.buffers)
            assert max(lengths) < self._capacity
            for part in _slices(len(hidden), MAX_ROWS):
                pieces = [
                    Piece(sequence=slot, first_row=row, num_rows=1, past=length, start=0)
                    for row, (slot, length) in enumerate(zip(slots[part], lengths[part], strict=True))
                ]
                rows = (table[part] for table in (hidden, cos, sin))
                outputs.append(self._run(*rows, pieces=pieces, threads=threads, goes_on=has_head))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        pieces: Sequence[Piece],
        threads: int | None,
        goes_on: bool = False,
    ) -> torch.Tensor:
        """Run at most MAX_ROWS rows, [..., E] and tables alike, of the bound sequences; on to the head if asked."""
        assert hidden.dtype == self._dtype
        assert cos.shape[-1] <= self._shape.head_dim
        inputs, cos, sin = (table.to(self._dtype).contiguous() for table in (hidden, cos, sin))
        outputs = torch.empty_like(inputs)
        self._shape.rotary_dim = cos.shape[-1]
        step = self._call(Step, inputs[..., 0].numel(), threads or torch.get_num_threads())
        table = (Piece * len(pieces))(*pieces)
        step.num_pieces, step.capacity, step.pieces = len(pieces), self._capacity, ctypes.addressof(table)
        step.inputs, step.outputs = inputs.data_ptr(), outputs.data_ptr()
        step.cos, step.sin = cos.data_ptr(), sin.data_ptr()
        # Made ready before: Python is slow once the weights of all layers have gone through the processor's caches.
        head, logits = self._head_call(outputs, threads=step.threads) if goes_on else (None, outputs)
        self._library.decode_layers(self._shape, self._layers, step)
        if head is not None:
            self._library.compute_logits(head)
        return logits

    def _head_call(self, hidden: torch.Tensor, *, threads: int) -> tuple[Head, torch.Tensor]:
        """Return the call for contiguous rows [..., E], at most MAX_ROWS, and the logits [..., V] that it writes."""
        logits = hidden.new_empty((*hidden.shape[:-1], self._head.out_features))
        call = self._call(Head, logits[..., 0].numel(), threads)
        call.inputs, call.logits = hidden.data_ptr(), logits.data_ptr()
        return call, logits

    def head(self, hidden: torch.Tensor, *, threads: int) -> torch.Tensor:
        """Return the logits [..., V] of hidden states [..., E], in the model's dtype; without threads by torch."""
        assert self._norm is not None
        assert self._head is not None
        if not threads:
            logits: torch.Tensor = self._head(self._norm(hidden))
            return logits if self._logits_scaling == 1.0 else logits / self._logits_scaling
        rows, found = hidden.reshape(-1, hidden.shape[-1]).contiguous(), []
        with self._lock:
            for part in _slices(len(rows), MAX_ROWS):
                call, part_logits = self._head_call(rows[part], threads=threads)
                self._library.compute_logits(call)
                found.append(part_logits)
        return torch.cat(found).view(*hidden.shape[:-1], -1)

    def _make_room(self, cache: Sequence[FastLayer], *, batch: int, new_tokens: int) -> None:
        """Point the layers at the cache's buffers, with room for the new tokens."""
        buffers = [layer.buffers for layer in cache]
        if self._is_bound(buffers) and cache[0].length + new_tokens <= self._capacity:
            return
        for layer in cache:
            layer.start(batch, self._shape.num_kv_heads, self._shape.head_dim, dtype=self._dtype)
            layer.reserve(new_tokens)
            assert layer.length == cache[0].length
            assert layer.buffers[0].shape[0] == batch
        self._bind([layer.buffers for layer in cache])

    def _bind(self, buffers: Sequence[Buffers]) -> None:
        """Point the layers at these buffers."""
        if self._is_bound(buffers):
            return
        sequences, _, capacity, _ = buffers[0][0].shape
        for entry, (keys, values) in zip(self._layers, buffers, strict=True):
            assert keys.shape == values.shape == (sequences, self._shape.num_kv_heads, capacity, self._shape.head_dim)
            assert keys.dtype == values.dtype == self._dtype
            assert keys.is_contiguous()
            assert values.is_contiguous()
            entry.keys, entry.values = keys.data_ptr(), values.data_ptr()
        self._bound = [weakref.ref(keys) for keys, _ in buffers]
        self._capacity = capacity

    def _is_bound(self, buffers: Sequence[Buffers]) -> bool:
        pairs = zip(self._bound, buffers, strict=False)
        return len(self._bound) == len(buffers) and all(known() is keys for known, (keys, _) in pairs)

    def _call(self, kind: type[_Call], rows: int, threads: int) -> _Call:
        """Return what a native call of so many rows is given, with all that is the same every time."""
        key = (kind, rows, threads, self._shape.rotary_dim)
        if key not in self._calls:
            workspace, counters = self._workspace(rows, threads=threads)  # others may have moved
            same = {"threads": threads, "rows": rows, "workspace": workspace, "counters": counters}
            same |= {"num_layers": len(self._layers)} if kind is Step else self._head_constants()
            self._calls[key] = kind(openmp=self._library.openmp_address, **same)
        found: _Call = self._calls[key]
        return found

    def _head_constants(self) -> dict[str, Any]:
        return {
            "dtype": DTYPES[self._dtype],
            "hidden_size": self._head.in_features,
            "vocab_size": self._head.out_features,
            "norm_eps": self._norm.variance_epsilon,
            "logits_scaling": self._logits_scaling,
            "norm": self._norm.weight.data_ptr(),
            "weight": linear_addresses(self._head),
        }

    def _workspace(self, rows: int, *, threads: int) -> tuple[int, int]:
        """Return the addresses of scratch space and counters."""
        needed = self._library.workspace_floats(self._shape, rows=rows, threads=threads)
        if self._scratch is None or self._scratch[0].numel() < needed:
            vocab_size = 0 if self._head is None else self._head.out_features
            count = self._library.num_counters(self._shape, num_layers=len(self._layers), vocab_size=vocab_size)
            counters = torch.empty(count, dtype=torch.int64)
            self._scratch = (torch.empty(needed, dtype=torch.float32), counters)
            self._calls.clear()
        return self._scratch[0].data_ptr(), self._scratch[1].data_ptr()


def first_slots(attention_mask: torch.Tensor | None, *, batch: int) -> torch.Tensor | None:
    """Return the first unpadded slot [B] of each sequence, or None if the mask is not plain left padding.

    Args:
        attention_mask: [B, T] with 0 for padding, or None when nothing is padded.
        batch: B.
    """
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    if attention_mask.dim() != 2:
        return None
    is_token = attention_mask != 0
    start = is_token.shape[1] - is_token.sum(dim=1)
    is_left_padded = torch.equal(is_token, torch.arange(is_token.shape[1]) >= start[:, None])
    return start if is_left_padded else None


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def _shape(layer: Any, config: PreTrainedConfig, dtype: torch.dtype) -> Shape:
    attention = layer.self_attn if layer is not None else None
    return Shape(
        dtype=DTYPES[dtype],
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim if attention else 1,
        rotary_dim=0,
        intermediate_size=config.intermediate_size,
        norm_eps=layer.input_layernorm.variance_epsilon if layer is not None else 0.0,
        attention_scale=attention.scaling if attention else 1.0,
        residual_multiplier=getattr(layer, "residual_multiplier", 1.0),
    )


def _layer(layer: Any, config: PreTrainedConfig) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = {name: getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)}
    return Layer(
        input_norm=layer.input_layernorm.weight.data_ptr(),
        post_norm=layer.post_attention_layernorm.weight.data_ptr(),
        window=layer_window(layer, config),
        has_rope=int(bool(getattr(attention, "use_rope", True))),
        o=linear_addresses(attention.o_proj),
        down=linear_addresses(mlp.down_proj),
        **dict(_attention_inputs(attention, config)),
        **dict(_mlp_inputs(mlp, config)),
        **{name: norm.weight.data_ptr() for name, norm in norms.items()},
    )


def _attention_inputs(attention: Any, config: PreTrainedConfig) -> Iterator[tuple[str, Linear]]:
    if not hasattr(attention, "qkv_proj"):
        return ((name, linear_addresses(getattr(attention, f"{name}_proj"))) for name in ("q", "k", "v"))
    q_rows, k_rows = (n * attention.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return _fused(attention.qkv_proj, {"q": q_rows, "k": k_rows, "v": k_rows})


def _mlp_inputs(mlp: Any, config: PreTrainedConfig) -> Iterator[tuple[str, Linear]]:
    if not hasattr(mlp, "gate_up_proj"):
        return ((name, linear_addresses(getattr(mlp, f"{name}_proj"))) for name in ("gate", "up"))
    return _fused(mlp.gate_up_proj, dict.fromkeys(("gate", "up"), config.intermediate_size))


def _fused(linear: Any, rows: dict[str, int]) -> Iterator[tuple[str, Linear]]:
    """The parts of a fused projection: its weight rows one part after the other."""
    assert linear.bias is None
    first = 0
    for name, count in rows.items():
        yield name, linear_addresses(linear, first=first)
        first += count


def layer_window(layer: Any, config: PreTrainedConfig) -> int:
    """Return how many tokens a decoder layer looks back on, itself included; 0 for all."""
    source = config if config.model_type in _WINDOW_FOR_ALL else layer.self_attn
    return int(getattr(source, "sliding_window", None) or 0)
