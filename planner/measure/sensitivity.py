"""How much does each layer of a model mind being stored in 4 bits, and all of them being stored in 8?

One layer at a time is rounded as the exporter does it, and the whole model reads some text with it; what that changes
is the layer's sensitivity. Cheaper signs (squared errors, sizes of activations) do not rank layers.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from planner.measure.replay import Changes, Replay
from planner.model.find import model_name
from plans.checkpoint.run_dtype import run_dtype
from plans.checkpoint.units import Checkpoint
from plans.commands.machine_memory import memory_bytes
from plans.dtypes import DTYPES, DtypeName
from plans.errors import InputError, MachineError
from plans.packed.choice import AS_STORED, WeightChoice
from plans.packed.rounding import round_to_nearest
from plans.packed.scheme import Scheme
from plans.packed.words import unpack_numbers
from plans.profile import ShardIdentity
from plans.reading.files import sha256_hex
from plans.reading.sizes import format_bytes
from plans.sensitivity import PartialSensitivity, Sensitivity, SensitivitySubject
from plans.stages import StageRange
from runtime.reading.capacity import memory_faults
from runtime.reading.families import parse_model_config
from runtime.reading.tensors import FolderTensors, torch_dtype
from runtime.reading.tokenizer import CHARACTERS_PER_TOKEN, first_tokens, load_tokenizer, read_prompt
from runtime.stages.loading import load_chain

WINDOW_TOKENS = 512
LEAST_TOKENS = 32
FLOAT_BYTES = 4
MATRIX = 2

Keep = Callable[[PartialSensitivity], None]
Progress = Callable[[str, int, int], None]
"""Told what is measured, how much is done, and of how much."""


def windows_of(checkpoint: Checkpoint, text: bytes, *, num_tokens: int, where: object) -> torch.Tensor:
    """Return windows of tokens [N, S] from all over a text; of a short one its beginning.

    Raises:
        InputError: not UTF-8, too short, or the checkpoint has no tokenizer.
    """
    assert checkpoint.directory is not None
    tokenizer = load_tokenizer(checkpoint.directory, vocab_size=checkpoint.config.vocab_size)
    words = read_prompt(text, where=where)
    longest = min(WINDOW_TOKENS, checkpoint.config.max_position_embeddings)
    parts = max(1, num_tokens // longest)
    spread = [first_tokens(tokenizer, words[len(words) * part // parts :], num_tokens=longest) for part in range(parts)]
    # A text longer than all windows has room between them.
    if len(words) > parts * longest * CHARACTERS_PER_TOKEN and all(len(window) == longest for window in spread):
        return torch.tensor(spread)
    ids = first_tokens(tokenizer, words, num_tokens=num_tokens)
    if len(ids) < LEAST_TOKENS:
        raise InputError(
            f"holds {len(ids)} tokens", where=where, expected=f"at least {LEAST_TOKENS}, better 2,000", code="E-TEXT"
        )
    size = min(longest, len(ids))
    return torch.tensor(ids[: len(ids) // size * size]).view(-1, size)


def subject_of(
    checkpoint: Checkpoint, windows: torch.Tensor, text: bytes, *, dtype: DtypeName | None
) -> SensitivitySubject:
    """Describe a measurement."""
    return SensitivitySubject(
        name=model_name(checkpoint.path),
        config_sha256=checkpoint.config.sha256,
        shards=tuple(
            ShardIdentity(name=s.name, size_bytes=s.header.file_bytes, header_sha256=s.header.header_sha256)
            for s in checkpoint.shards
        ),
        num_hidden_layers=checkpoint.config.num_hidden_layers,
        dtype=dtype or run_dtype(checkpoint),
        text_sha256=sha256_hex(text),
        num_tokens=windows.numel(),
        window_tokens=windows.shape[1],
    )


def measure_sensitivity(
    checkpoint: Checkpoint, windows: torch.Tensor, *, known: PartialSensitivity, keep: Keep, progress: Progress
) -> Sensitivity:
    """Measure what is not known yet.

    Args:
        checkpoint: one that can be packed (`planner.model.packed.check_packable`).
        windows: token ids [N, S].
        known: its subject, and what an interrupted measurement found of it.
        keep: called with all that is known after every step.
        progress: told how far it is.

    Raises:
        MachineError: there is not enough memory, with both numbers.
        InputError: as `runtime.stages.chain.build_chain`.
    """
    layers = checkpoint.config.num_hidden_layers
    has_head = not checkpoint.config.tie_word_embeddings
    total, done = layers + 1 + has_head, 0
    _check_room(checkpoint, windows)
    rounding = Rounding(checkpoint, dtype=known.subject.dtype)
    progress("reading the text", done, total)
    with memory_faults("measuring sensitivities"):
        replay = rounding.replay(windows)
        for what, find, update in _steps(rounding, replay, known, has_head=has_head):
            progress(what, done, total)
            if find is not None:
                known = known.model_copy(update=update(find(), known))
                keep(known)
            done += 1
    progress("", done, total)
    assert known.int8 is not None, "a step was left out"
    return Sensitivity(subject=known.subject, int8=known.int8, head_int8=known.head_int8, int4=known.int4)


Find = Callable[[], float]
Update = Callable[[float, PartialSensitivity], dict[str, object]]


def _steps(
    rounding: "Rounding", replay: Replay, known: PartialSensitivity, *, has_head: bool
) -> Iterator[tuple[str, Find | None, Update]]:
    """Yield every step: in words, how its error is found (None where it is known), and where it is noted."""
    num = replay.num_layers
    kept = (AS_STORED,) * num

    def find(layer_bits: tuple[int, ...], *, first: int, head_bits: int = AS_STORED) -> Find:
        return lambda: replay.divergence(rounding.changes(layer_bits, head_bits=head_bits), first=first)

    all_layers, head = find((8,) * num, first=0), find(kept, first=num, head_bits=8)
    yield "all layers in int8", all_layers if known.int8 is None else None, lambda error, _: {"int8": error}
    if has_head:
        yield "head in int8", head if known.head_int8 is None else None, lambda error, _: {"head_int8": error}
    for index in range(num):
        layer = find((*kept[:index], 4, *kept[index + 1 :]), first=index)
        yield (
            f"layer {index} in int4", layer if index >= len(known.int4) else None,
            lambda error, known: {"int4": (*known.int4, error)},
        )  # fmt: skip


class Rounding:
    """A checkpoint's weights as they will be after the export.

    Example:
        >>> rounding = Rounding(checkpoint, dtype="bf16")  # doctest: +SKIP
        >>> rounding.replay(windows).divergence(rounding.changes((4, 8, 16)), first=0)  # doctest: +SKIP
        0.013
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: DtypeName) -> None:
        self._checkpoint = checkpoint
        self._dtype: DtypeName = dtype
        self._tensors = FolderTensors(checkpoint)

    def replay(self, windows: torch.Tensor) -> Replay:
        """Load the model as it is and let it read the windows [N, S]."""
        config = self._checkpoint.config
        whole = StageRange.whole(config.num_hidden_layers)
        chain = load_chain(parse_model_config(dict(config.raw)), [whole], self._tensors, dtype=self._dtype)
        return Replay(chain, windows)

    def changes(self, layer_bits: tuple[int, ...], *, head_bits: int = AS_STORED) -> Changes:
        """Return the weights of layers, and of the head, with so many bits; they are made when they are asked for."""
        choice = WeightChoice(kind="mixed", layer_bits=layer_bits, head_bits=head_bits)
        matrices = {n: t.entry.shape for n, t in self._checkpoint.tensors.items() if len(t.entry.shape) == MATRIX}
        schemes = {n: choice.scheme_of(n.removesuffix(".weight"), out=s[0], in_=s[1]) for n, s in matrices.items()}
        return {n: partial(self._rounded, n, scheme) for n, scheme in schemes.items() if scheme is not None}

    def stored(self, name: str) -> torch.Tensor:
        """Return a matrix as it is stored."""
        return self._tensors[name]

    def _rounded(self, name: str, scheme: Scheme) -> torch.Tensor:
        """Return a matrix [out, in] as a runtime unpacks it: numbers times scales, in the model's dtype."""
        weight, kind = self.stored(name), torch_dtype(self._dtype)
        data = memoryview(weight.contiguous().view(torch.uint8).numpy().reshape(-1).data)
        stored, scale = self._checkpoint.tensors[name].entry.dtype, DTYPES[self._dtype].stored
        found = round_to_nearest(data, stored=stored, scheme=scheme, scale=scale, name=name)
        assert scheme.group_size is not None
        numbers = torch.from_numpy(unpack_numbers(found.words, scheme)).view(-1, scheme.group_size)
        scales = torch.frombuffer(bytearray(found.scales), dtype=kind).view(-1, 1)
        return (numbers.to(kind) * scales).view(weight.shape)


def _check_room(checkpoint: Checkpoint, windows: torch.Tensor) -> None:
    config, free = checkpoint.config, memory_bytes()[1]
    hidden = windows.numel() * config.hidden_size * (config.num_hidden_layers + 1)
    tokens = (windows.numel() + 3 * windows.shape[1]) * config.vocab_size
    layer = max(_largest_layer(checkpoint), config.vocab_size * config.hidden_size)
    needed = FLOAT_BYTES * (hidden + tokens + 2 * layer)
    if needed > free:
        raise MachineError(
            f"{windows.numel()} tokens need {format_bytes(needed)} ({needed} bytes) beside the model, "
            f"{format_bytes(free)} ({free} bytes) are free",
            hint="lower --tokens",
            code="E-MEMORY",
        )


def _largest_layer(checkpoint: Checkpoint) -> int:
    sizes: dict[str, int] = {}
    for name, stored in checkpoint.tensors.items():
        unit = ".".join(name.split(".")[:3])
        sizes[unit] = sizes.get(unit, 0) + stored.entry.num_elements
    return max(sizes.values())
