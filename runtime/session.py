"""Everything a command needs to run a model: the chain, its tokenizer, and what it may use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from plans.checkpoint import require_full
from plans.config import DTYPE_NAMES
from plans.errors import UsageError
from runtime.capacity import check_room, stage_need
from runtime.chain import Chain
from runtime.families import parse_model_config
from runtime.loading import FolderTensors, load_chain, place_stages, read_generation_config, stored_dtype
from runtime.opening import Source, open_source, verify_weights
from runtime.tokenizer import eos_token_ids, load_tokenizer


@dataclass(frozen=True, slots=True)
class Session:
    """A loaded model.

    Attributes:
        source: what it was loaded from.
        chain: the model.
        tokenizer: its tokenizer.
        context_tokens: prompt and new tokens together may not exceed this.
        eos_token_ids: tokens that end a sequence.
    """

    source: Source
    chain: Chain
    tokenizer: PreTrainedTokenizerBase
    context_tokens: int
    eos_token_ids: frozenset[int]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def open_session(
    source: Source,
    *,
    device_map: Mapping[int, str],
    dtype: str | None = None,
    context_tokens: int | None = None,
    batch_size: int = 1,
    verifies: bool = True,
    progress: Callable[[str], None] = lambda _text: None,
) -> Session:
    """Load a model onto its devices, after checking that there is room for it.

    Args:
        source: from `open_source`.
        device_map: zero-based stage index -> device, where it differs from the plan's.
        dtype: `fp32`, `bf16` or `fp16`; None keeps the plan's or the checkpoint's.
        context_tokens: None takes the plan's context, else the model's.
        batch_size: sequences that will run at once.
        verifies: compare the weights with the export's checksums.
        progress: told what is being done.

    Raises:
        UsageError: a context longer than the model's, or a dtype that an export does not hold.
        MachineError: a device is missing, or memory is short; with both numbers.
        InputError, IntegrityError: the files are not what they should be.
    """
    config = source.checkpoint.config
    chosen_dtype = _choose_dtype(source, dtype)
    context = _choose_context(source, context_tokens)
    devices = place_stages(source.stages, device_map=device_map)
    needs = [
        stage_need(source.checkpoint, stage, dtype=chosen_dtype, context_tokens=context, batch_size=batch_size)
        for stage in source.stages
    ]
    check_room(needs, source.stages, devices)
    tokenizer = load_tokenizer(source.folder, vocab_size=config.vocab_size)
    if verifies:
        progress("checking the bundles")
        verify_weights(source)
    progress("loading")
    chain = _load(source, device_map=device_map, dtype=chosen_dtype)
    ends = eos_token_ids(chain.generation_config, tokenizer, vocab_size=config.vocab_size)
    return Session(source, chain, tokenizer, context, ends)


def _load(source: Source, *, device_map: Mapping[int, str], dtype: str) -> Chain:
    config = parse_model_config(source.checkpoint.config.raw)
    config.name_or_path = str(source.folder)
    return load_chain(
        config,
        source.stages,
        FolderTensors(source.checkpoint),
        dtype=dtype,
        device_map=device_map,
        generation_config=read_generation_config(require_full(source.checkpoint)),
    )


def _choose_dtype(source: Source, dtype: str | None) -> str:
    if dtype is None:
        return source.dtype or stored_dtype(source.checkpoint)
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"'{dtype}' is not a dtype", where="--dtype", expected="fp32, bf16 or fp16")
    return DTYPE_NAMES[dtype]


def _choose_context(source: Source, context_tokens: int | None) -> int:
    limit = source.checkpoint.config.max_position_embeddings
    if context_tokens is None:
        return min(source.plan.workload.context_tokens, limit) if source.plan else limit
    if context_tokens > limit:
        raise UsageError(
            f"{context_tokens} tokens are more than the model was trained for ({limit})",
            where="--ctx-size",
            expected=f"1 to {limit}",
        )
    return context_tokens


def load(
    path: str | Path,
    *,
    model: str | Path | None = None,
    device_map: Mapping[int, str] | None = None,
    dtype: str | None = None,
) -> Chain:
    """Load an export, a plan with its checkpoint, or a plain checkpoint as a chain for use from Python.

    Args:
        path: export folder, plan file or checkpoint folder.
        model: the checkpoint, when `path` is a plan file.
        device_map: zero-based stage index -> torch device, where it differs from the plan's.
        dtype: `fp32`, `bf16` or `fp16`; None keeps the plan's or the checkpoint's.

    Returns:
        A model that works with `generate()`, streamers, pipelines and everything else in transformers.

    Raises:
        LlamaplanError: as `open_source` and `open_session`; the message says what to do.

    Example:
        >>> chain = load("shards", device_map={1: "cpu"})  # doctest: +SKIP
    """
    source = open_source(Path(path), model=None if model is None else Path(model))
    verify_weights(source)
    return _load(source, device_map=device_map or {}, dtype=_choose_dtype(source, dtype))
