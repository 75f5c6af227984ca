"""What lies between the products of a prompt, computed natively: sums and norms, rotary positions and the cache, SiLU.

Torch multiplies many rows faster than the kernels where it has the processor's own instructions for it; what
transformers does between its products, in some forty passes over small matrices, takes as long again.

Shapes: B sequences, S new tokens, E hidden size, H query heads, K key/value heads, D head size, F feed-forward size.
"""

import ctypes
from typing import Any

import torch

from runtime.fast.native import Activation, Join, Layer, Library, Placement, Shape

_COUNTERS = 16


class Between:
    """Calls of one stage; not to be used by two threads at once.

    Example:
        >>> between = Between(kernels, shape)  # doctest: +SKIP
        >>> normed = between.join(hidden, None, layer.input_layernorm)  # doctest: +SKIP
    """

    def __init__(self, library: Library, shape: Shape) -> None:
        """Take what every call needs; `shape` is the stage's own, whose `rotary_dim` `place` sets."""
        self._library, self._shape = library, shape
        self._counters = torch.empty(_COUNTERS, dtype=torch.int64)

    def join(self, hidden: torch.Tensor, update: torch.Tensor | None, norm: Any) -> torch.Tensor:
        """Add an update [B, S, E] to hidden states of the same size, in place; return their norm, or themselves."""
        threads, columns = torch.get_num_threads(), hidden.shape[-1]
        result = hidden if norm is None else torch.empty_like(hidden)
        workspace = torch.empty(threads, 2, -(-columns // 16) * 16)
        update = None if update is None else update.contiguous()
        self._library.join_rows(
            Join(
                **self._crew(hidden.numel() // columns, threads),
                dtype=self._shape.dtype,
                columns=columns,
                norm_eps=self._shape.norm_eps,
                multiplier=self._shape.residual_multiplier,
                hidden=hidden.data_ptr(),
                update=0 if update is None else update.data_ptr(),
                norm=0 if norm is None else norm.weight.data_ptr(),
                result=result.data_ptr(),
                workspace=workspace.data_ptr(),
            )
        )
        return result

    def place(
        self,
        layer: Layer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        tables: tuple[torch.Tensor, torch.Tensor],
        past: int,
        capacity: int,
    ) -> None:
        """Norm and turn queries [B, S, H D] in place, and put keys and values [B, S, K D] into a layer's cache."""
        cos, sin = tables
        assert cos.shape == sin.shape == (*q.shape[:2], self._shape.rotary_dim)
        assert past + q.shape[1] <= capacity
        self._library.place_heads(
            Placement(
                **self._crew(q.shape[0] * q.shape[1], torch.get_num_threads()),
                shape=ctypes.addressof(self._shape),
                layer=ctypes.addressof(layer),
                new_tokens=q.shape[1],
                past=past,
                capacity=capacity,
                q_pitch=_pitch(q),
                k_pitch=_pitch(k),
                v_pitch=_pitch(v),
                **{name: part.data_ptr() for name, part in (("q", q), ("k", k), ("v", v), ("cos", cos), ("sin", sin))},
            )
        )

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return SiLU(gate) * up; all are [B, S, F]."""
        assert _pitch(gate) == _pitch(up)
        result = torch.empty(gate.shape, dtype=gate.dtype)
        self._library.activate_rows(
            Activation(
                **self._crew(gate.shape[0] * gate.shape[1], torch.get_num_threads()),
                dtype=self._shape.dtype,
                columns=gate.shape[2],
                pitch=_pitch(gate),
                gate=gate.data_ptr(),
                up=up.data_ptr(),
                result=result.data_ptr(),
            )
        )
        return result

    def _crew(self, rows: int, threads: int) -> dict[str, int]:
        return {
            "openmp": self._library.openmp_address,
            "threads": threads,
            "rows": rows,
            "counters": self._counters.data_ptr(),
        }


def _pitch(rows: torch.Tensor) -> int:
    """Return how many numbers lie from one row of [B, S, ...] to the next one."""
    assert rows.stride(2) == 1
    assert rows.shape[0] == 1 or rows.stride(0) == rows.shape[1] * rows.stride(1)
    return rows.stride(1)
