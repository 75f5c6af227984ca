"""What one stage keeps per group of sequences, and how it computes a step. The same for the driver and for workers.

Shapes: B sequences, S columns of a step, T columns so far, E hidden size, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from plans.errors import NumericalError, PeerError
from runtime.distributed.control.messages import Drawing, Open
from runtime.distributed.header import CLOSE, DTYPE_CODES, STEP, Header, check_against
from runtime.generate.loop import Request
from runtime.generate.rules import Ending
from runtime.generate.sampling import Sampling
from runtime.generate.token_chooser import TokenChooser
from runtime.generate.tokens import TokenBatch
from runtime.reading.devices import synchronize
from runtime.stages.stage import Stage


@dataclass(slots=True)
class Slot:
    """A group on one stage.

    Attributes:
        batch: padding, mask and positions; real token ids only where they are needed.
        choosers: one per sequence; empty on every stage but the last.
        cache: this stage's cache; None until the first step, which takes over an earlier group's if it continues one.
        step: the step that must come next.
        columns: columns in the cache.
    """

    opening: Open
    batch: TokenBatch
    choosers: list[TokenChooser]
    cache: Any = None
    step: int = 0
    columns: int = field(init=False)

    def __post_init__(self) -> None:
        self.columns = self.opening.keeps_tokens


class StageRunner:
    """Computes steps of one stage.

    Args:
        stage: the loaded stage.
        number: zero-based place in the chain.
        hidden_size: width of hidden states.
    """

    def __init__(self, stage: Stage, *, number: int, hidden_size: int) -> None:
        self.stage, self.number = stage, number
        self._hidden_size = hidden_size
        self._slots: dict[int, Slot] = {}

    def clear(self) -> None:
        """Forget every group."""
        self._slots.clear()

    def open(self, opening: Open) -> None:
        """Make room for a group."""
        prompts = opening.prompts or [[0] * length for length in opening.lengths]
        batch = TokenBatch(prompts, num_new_tokens=opening.num_new_tokens, pad_token_id=0)
        choosers = [_chooser(drawing) for drawing in opening.drawings] if self.stage.spec.has_head else []
        self._slots[opening.group] = Slot(opening, batch, choosers)

    def close(self, group: int) -> None:
        """Forget a group; nothing happens if its cache was taken over."""
        self._slots.pop(group, None)

    def has(self, group: int) -> bool:
        """Whether the group was opened."""
        return group in self._slots

    def expect(self, header: Header) -> None:
        """Check that a header of hidden states is exactly what must come next for its group.

        Raises:
            PeerError: it is not.
        """
        slot = self._slots.get(header.group)
        if header.kind == CLOSE:
            return
        if slot is None:
            raise PeerError(f"hidden states for group {header.group} came, which is not open", code="E-HEADER")
        check_against(
            header,
            kind=STEP,
            sender=self.number - 1,
            rows=len(slot.opening.lengths),
            width=self._hidden_size,
            dtype=DTYPE_CODES[str(self.stage.model.dtype).removeprefix("torch.")],
        )

    def is_prefill(self, header: Header) -> bool:
        """Whether a step reads prompt tokens."""
        return header.start + header.columns <= max(self._slots[header.group].opening.lengths)

    @torch.inference_mode()
    def run(self, header: Header, inputs: torch.Tensor) -> torch.Tensor:
        """Compute one step and return hidden states [B, S, E], or fp32 logits [B, V] from the last stage.

        Args:
            header: says which columns of which group.
            inputs: token ids [B, S] for the first stage, hidden states [B, S, E] for the others.

        Raises:
            PeerError: a step that is stale, repeated or out of order.
            NumericalError: NaN or infinity came out.
        """
        slot = self._slots[header.group]
        check_against(header, step=slot.step, start=slot.columns if header.start else 0)
        self._take_cache(slot)
        if header.start < slot.columns:  # all columns again; see `Flow.next_span`
            slot.cache = self.stage.new_cache() if self.stage.has_layers else None
        end = header.start + header.columns
        outputs: torch.Tensor = self.stage(
            inputs.to(self.stage.device),
            attention_mask=_moved(slot.batch.mask(end), self.stage.device),
            position_ids=slot.batch.positions(header.start, end).to(self.stage.device),
            cache=slot.cache,
            logits_to_keep=1,
        )
        synchronize(self.stage.device)
        slot.step, slot.columns = slot.step + 1, end
        self._require_finite(outputs, slot)
        if not self.stage.spec.has_head:
            return outputs
        return outputs[:, -1].to(device="cpu", dtype=torch.float32)

    def choose(self, group: int, logits: torch.Tensor) -> torch.Tensor:
        """Choose the next token of every sequence of a group: int64 [B]."""
        slot = self._slots[group]
        if all(chooser.is_plain_argmax for chooser in slot.choosers):
            tokens = logits.argmax(dim=-1)
        else:
            pairs = enumerate(slot.choosers)
            chosen = [chooser.choose(logits[row], token_ids=slot.batch.sequence(row)) for row, chooser in pairs]
            tokens = torch.tensor(chosen, dtype=torch.int64)
        slot.batch.append(tokens.tolist())
        return tokens

    def _take_cache(self, slot: Slot) -> None:
        if slot.cache is not None or not self.stage.has_layers:
            return
        earlier = None if slot.opening.continues is None else self._slots.pop(slot.opening.continues, None)
        slot.cache = self.stage.new_cache() if earlier is None else earlier.cache
        if earlier is not None and earlier.columns > slot.opening.keeps_tokens:
            slot.cache.crop(slot.opening.keeps_tokens - earlier.columns)

    def _require_finite(self, outputs: torch.Tensor, slot: Slot) -> None:
        # Only the last column: what stands in padding is never used and may be anything.
        if torch.isfinite(outputs[:, -1]).all():
            return
        spec = self.stage.spec
        step = slot.columns - max(slot.opening.lengths)
        when = f"step {step}" if step > 0 else "reading the prompt"
        raise NumericalError(
            f"{when}: NaN or infinity in stage {self.number} ({spec.words}) on {spec.device}",
            hint="try --dtype fp32, or check the weights with llamaplan verify",
            code="E-NONFINITE",
        )


def drawing_of(request: Request, room: int) -> Drawing:
    """Return how the tokens of a request are chosen, as it is sent; it gets at most `room` of them."""
    sampling = request.sampling
    ending = request.ending(room)
    return Drawing(
        temperature=float(sampling.temperature),
        top_k=sampling.top_k,
        top_p=float(sampling.top_p),
        min_p=None if sampling.min_p is None else float(sampling.min_p),
        repetition_penalty=float(sampling.repetition_penalty),
        seed=sampling.seed,
        rules=dict(sampling.rules),
        sequence_index=request.sequence_index,
        max_length=ending.max_length,
        eos_token_ids=ending.eos_token_ids,
    )


def _chooser(drawing: Drawing) -> TokenChooser:
    ending = Ending(max_length=drawing.max_length, eos_token_ids=drawing.eos_token_ids)
    settings = drawing.model_dump(exclude={"sequence_index", "max_length", "eos_token_ids"})
    return TokenChooser(Sampling(**settings), sequence_index=drawing.sequence_index, ending=ending)


def _moved(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
