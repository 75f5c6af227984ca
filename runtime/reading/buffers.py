"""Rebuild what checkpoints do not store: rotary frequencies and embedding scales."""

from typing import Any

import torch
from transformers import PreTrainedModel


def rebuild_buffers(model: PreTrainedModel, *, dtype: torch.dtype, device: torch.device, has_embedding: bool) -> None:
    """Give the non-persistent buffers of a meta-device model their values on `device`.

    Rotary frequencies are computed in fp32 on the CPU, as `from_pretrained` does, and then moved; they stay fp32
    whatever the dtype of the weights.
    """
    base: Any = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=model.config).to(device)
    if has_embedding and hasattr(base.embed_tokens, "embed_scale"):
        scale = torch.tensor(base.embed_tokens.scalar_embed_scale, dtype=dtype, device=device)
        base.embed_tokens.register_buffer("embed_scale", scale, persistent=False)


def check_filled(model: PreTrainedModel) -> None:
    """Require that nothing is left on the meta device (a family with a buffer that is not known here)."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"no values for {left}"
