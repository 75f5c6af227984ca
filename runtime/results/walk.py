"""`--verbose`: a walk through the chain, step by step."""

from collections.abc import Callable

from plans.errors import printable
from plans.stages import describe_stage
from runtime.session_kind import AnySession
from runtime.steps import StepTrace


class Walk:
    """Writes a few lines for every step: stages, shapes, seconds, and the token that came out.

    Args:
        session: the model.
        write: receives one line at a time.
    """

    def __init__(self, session: AnySession, *, write: Callable[[str], None]) -> None:
        self._session = session
        self._views = session.stage_views(batch_size=1)
        self._config = session.source.checkpoint.config
        self._write = write

    def __call__(self, trace: StepTrace) -> None:
        name = "prefill" if trace.step == 0 else f"decode {trace.step}"
        self._write(f"{name}: {trace.num_tokens} tokens, {trace.num_past_tokens} in the cache")
        for index in range(len(trace.stages)):
            self._write(self._stage_line(index, trace))
        for token in trace.token_ids:
            self._write(f"  -> token {token} '{printable(self._session.prepared.tokenizer.decode([token]))}'")

    def _stage_line(self, index: int, trace: StepTrace) -> str:
        view, times = self._views[index], trace.stages[index]
        return (
            f"  stage {index} on {view.device} ({describe_stage(view.spec)}): "
            f"{self._input_shape(index, trace)} -> {self._output_shape(index, trace)}, "
            f"hop {1000 * times.hop_seconds:.3f} ms, compute {1000 * times.compute_seconds:.2f} ms ({times.path})"
        )

    def _input_shape(self, index: int, trace: StepTrace) -> str:
        shape = [trace.batch_size, trace.num_tokens]
        return f"ids {shape}" if index == 0 else f"hidden {[*shape, self._config.hidden_size]}"

    def _output_shape(self, index: int, trace: StepTrace) -> str:
        config = self._config
        if index == len(trace.stages) - 1:
            return f"logits {[trace.batch_size, 1, config.vocab_size]}"
        return f"hidden {[trace.batch_size, trace.num_tokens, config.hidden_size]}"
