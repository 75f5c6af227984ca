"""Options of a command -> a workload, with defaults that fit the model."""

from plans.config.config import CONTEXT_KEY
from plans.config.context import beyond_context
from plans.dtypes import DTYPE_NAMES, DtypeName
from plans.errors import UsageError, printable
from plans.profile import ModelProfile
from plans.workload import Workload

DEFAULT_PROMPT_TOKENS = 128
DEFAULT_NEW_TOKENS = 128
DEFAULT_CONTEXT_TOKENS = 4096
MAX_TOKENS = 2**31


def parse_dtype(text: str | None, *, option: str = "--dtype") -> DtypeName | None:
    """Return our short name of a dtype (``bf16`` for ``bfloat16``), None for None.

    Raises:
        UsageError: not a dtype the runtime computes in.
    """
    if text is None:
        return None
    if text not in DTYPE_NAMES:
        raise UsageError(f"{option} '{printable(text, limit=40)}' is not known", expected=" or ".join(DTYPE_NAMES))
    return DTYPE_NAMES[text]


def make_workload(
    profile: ModelProfile,
    *,
    ctx_size: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    batch_size: int = 1,
    requests_in_flight: int = 1,
    prefill_chunk_tokens: int | None = None,
) -> Workload:
    """Return the workload that was asked for.

    Args:
        profile: the model; its dtypes are the workload's.
        ctx_size: context the KV cache is sized for; by default 4096 or what the model was trained for, whichever is
            less, but at least prompt + new tokens.
        prompt_tokens: by default 128, less in a smaller context.
        new_tokens: by default 128, less in a smaller context.
        batch_size: sequences per batch.
        requests_in_flight: batches in the pipeline at once.
        prefill_chunk_tokens: prompt tokens per step; by default the whole prompt at once, as `llamarun` does.

    Raises:
        UsageError: prompt and new tokens do not fit the context, or a number is out of range.
    """
    _check("--ctx-size", ctx_size, minimum=1)
    _check("--prompt-tokens", prompt_tokens, minimum=1)
    _check("--max-tokens", new_tokens, minimum=0)
    context = ctx_size or _default_context(profile, prompt_tokens, new_tokens)
    prompt = prompt_tokens or _default_prompt(context, new_tokens)
    new = min(DEFAULT_NEW_TOKENS, max(0, context - prompt)) if new_tokens is None else new_tokens
    if prompt + new > context:
        raise UsageError(
            f"{prompt} prompt tokens and {new} new tokens do not fit a context of {context}",
            hint=f"raise --ctx-size to {prompt + new}",
        )
    return Workload(
        prompt_tokens=prompt,
        new_tokens=new,
        context_tokens=context,
        batch_size=batch_size,
        requests_in_flight=requests_in_flight,
        prefill_chunk_tokens=min(prefill_chunk_tokens or prompt, prompt),
        dtype=profile.dtype,
        kv_cache_dtype=profile.kv_cache_dtype,
    )


def context_warnings(profile: ModelProfile, workload: Workload) -> tuple[str, ...]:
    """Return what is to be said about the context: that its bound is assumed, or that it is beyond it."""
    model = profile.model
    longest = model.longest_context_tokens
    assumed = (f"{CONTEXT_KEY} is {origin.how}" for origin in profile.origins if origin.number == CONTEXT_KEY)
    if workload.context_tokens <= longest:
        return tuple(assumed)
    what = beyond_context(workload.context_tokens, longest=longest, trained=model.max_position_embeddings)
    return (*assumed, f"{what}; memory is planned for them, llamarun and most engines refuse to run them")


def _check(option: str, value: int | None, *, minimum: int) -> None:
    if value is not None and not minimum <= value <= MAX_TOKENS:
        raise UsageError(f"{option} is {value}", expected=f"{minimum} to {MAX_TOKENS}")


def _default_context(profile: ModelProfile, prompt: int | None, new: int | None) -> int:
    asked = (prompt or DEFAULT_PROMPT_TOKENS) + (DEFAULT_NEW_TOKENS if new is None else new)
    trained = min(DEFAULT_CONTEXT_TOKENS, profile.model.max_position_embeddings)
    # Only what was asked for stretches the context; our own defaults shrink to what the model was trained for.
    return max(trained, asked) if prompt or new else trained


def _default_prompt(context: int, new: int | None) -> int:
    room = context // 2 if new is None else context - new
    return max(1, min(DEFAULT_PROMPT_TOKENS, room))
