"""Is the chain the unsplit model? Logits bit for bit, and greedy tokens, against transformers itself.

Shapes: B sequences, S tokens, V vocabulary.
"""

from collections.abc import Collection, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from plans.checkpoint.cache import find_snapshot
from plans.checkpoint.units import CONFIG_NAME
from plans.config.config import ModelConfig, read_config, without_foreign_code
from plans.errors import InputError, MachineError, printable
from plans.packed.scheme import Scheme
from runtime.reading.experts import stored_experts
from runtime.reading.families import parse_model_config
from runtime.stages.chain import Chain


@dataclass(frozen=True, slots=True)
class Comparison:
    """One case, both ways."""

    case: str
    num_values: int
    num_different: int
    max_abs_difference: float

    @property
    def is_identical(self) -> bool:
        """Whether every value is equal, bit for bit."""
        return self.num_different == 0


def load_unsplit(folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load the whole model with transformers, as its users would.

    Raises:
        InputError: transformers does not load the folder, with its reason; or it finds no weights under the names it
            knows and would fill them with random numbers.
        MachineError: its weights are packed, and what transformers unpacks them with is not installed.
    """
    path = find_snapshot(folder)
    is_packed = read_config(path / CONFIG_NAME).quantization is not None
    if is_packed and find_spec("compressed_tensors") is None:
        raise MachineError(
            "transformers loads packed weights with the package compressed-tensors, which is not installed",
            where=folder,
            hint="pip install compressed-tensors",
            code="E-PACKAGE",
        )
    try:
        # That package draws bars of its own.
        with redirect_stderr(StringIO()) if is_packed else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(  # with what it found: a pair
                str(path),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **_own_config(path),
            )
            if is_packed:
                loaded[0](torch.zeros(1, 1, dtype=torch.int64))  # the first step unpacks everything, for good
    except (OSError, ValueError, StrictDataclassError) as error:
        raise _not_loaded(error, folder) from None
    except RuntimeError as error:
        if _NOT_CONVERTED not in str(error):
            raise
        raise _not_loaded(error, folder) from None
    model: PreTrainedModel = loaded[0]
    _refuse_random_weights(loaded[1]["missing_keys"], folder)
    _refuse_other_experts(model, read_config(path / CONFIG_NAME), folder)
    model.eval()  # type: ignore[no-untyped-call]
    return model


_NOT_CONVERTED = "conversion of the weights"
"""What transformers says of tensors that do not become its own, such as plain experts beside packed layers."""


def _not_loaded(error: Exception, folder: Path) -> InputError:
    what = f"transformers does not load it: {printable(error, limit=300)}"
    return InputError(what, where=folder, code="E-MODEL")


def _refuse_random_weights(missing: Collection[str], folder: Path) -> None:
    if missing:
        raise InputError(
            f"transformers finds no {printable(min(missing))} there and would make up {len(missing)} tensors",
            where=folder,
            expected="the names that transformers saves",
            hint="an export of it has them; compare with the model before it was wrapped or renamed",
            code="E-MODEL",
        )


def _refuse_other_experts(model: Any, config: ModelConfig, folder: Path) -> None:
    """Refuse experts of several kinds: transformers unpacks all of them as one kind, without an error."""
    if config.packing is None or not config.num_experts:
        return
    from transformers.integrations.compressed_tensors import get_experts_scheme

    sizes = {"num_layers": config.num_hidden_layers, "num_experts": config.num_experts}
    schemes = set(map(config.packing.scheme_of, stored_experts(model_type=config.model_type, **sizes)))
    weights = get_experts_scheme(model.hf_quantizer.compressor.quantization_config).weights  # type: ignore[no-untyped-call]
    picked = Scheme(weights.num_bits, weights.group_size)
    if schemes != {picked}:
        found = " and ".join(sorted(scheme.words for scheme in schemes if scheme is not None))
        raise InputError(
            f"transformers would unpack every expert as {picked.words}, and they are {found}",
            where=folder,
            hint="llamarun runs it; compare with its bf16 original, or with numbers times scales in bf16",
            code="E-MODEL",
        )


def _own_config(folder: Path) -> dict[str, Any]:
    """Return the configuration to load with, where the folder's own names code elsewhere."""
    raw = read_config(folder / CONFIG_NAME).raw
    return {} if without_foreign_code(raw) == raw else {"config": parse_model_config(raw)}


def compare_models(
    chain: Chain, unsplit: PreTrainedModel, prompts: Sequence[Sequence[int]], *, num_tokens: int, chunk_tokens: int
) -> tuple[Comparison, ...]:
    """Compare a chain with the unsplit model.

    Args:
        chain: what is checked.
        unsplit: the reference, with weights of the same dtype.
        prompts: token ids of different lengths; run as one left-padded batch.
        num_tokens: greedy tokens to compare for every prompt.
        chunk_tokens: size of the pieces of the chunked prefill.
    """
    for model in (chain, unsplit):
        if getattr(model.config, "output_router_logits", False):
            model.config.output_router_logits = False  # for training; transformers fails at it beside a cache
    ids, mask = _left_pad(prompts)
    longest = torch.tensor([max(prompts, key=len)])
    with torch.inference_mode():
        batch = (_logits(model, ids, mask) for model in (chain, unsplit))
        chunks = (_chunked_logits(model, longest, chunk_tokens) for model in (chain, unsplit))
        tokens = (_greedy(model, ids, mask, num_tokens) for model in (chain, unsplit))
        return (
            _compare(f"logits of a left-padded batch of {len(prompts)}", *batch),
            _compare(f"logits of a prefill in chunks of {chunk_tokens}", *chunks),
            _compare(f"{num_tokens} greedy tokens for each prompt", *tokens),
        )


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask  # both [B, S]


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    device = model.device
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs = model(ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device))
    # What a padded position computes is nobody's: only real tokens are compared.
    kept: torch.Tensor = outputs.logits.cpu()[mask.bool()]
    return kept  # [tokens, V]


def _chunked_logits(model: Any, ids: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    parts = []
    for chunk in torch.split(ids, chunk_tokens, dim=1):
        outputs = model(chunk.to(model.device), past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.logits.cpu())
    return torch.cat(parts, dim=1)  # [1, S, V]


def _greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return tokens.cpu()[:, ids.shape[1] :]  # [B, num_tokens]


def _compare(case: str, chain: torch.Tensor, unsplit: torch.Tensor) -> Comparison:
    # A NaN in both is a difference: it proves nothing.
    different = int((chain != unsplit).sum())
    gap = (chain.double() - unsplit.double()).abs().max().item() if different else 0.0
    return Comparison(case, chain.numel(), different, gap)
