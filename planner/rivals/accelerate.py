"""How accelerate fills devices: module by module in the order of the model, until the next one does not fit.

Source: accelerate, `utils/modeling.py`, infer_auto_device_map (`auto` here, "sequential" in transformers) and
get_balanced_memory (`balanced`, which is what transformers' ``device_map="auto"`` starts from). Modules are whole units
here; a decoder layer is never split. Tested against the library itself (tests/planner/test_rules.py).

What makes it more than a plain greedy fill: a module that fits whole is placed whole; on the first GPU and on the CPU
room is kept for the largest layer still to come, so that layers kept elsewhere can be brought in; and a tied head goes
where the embedding is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

DISK = "disk"
LEAVES_PER_LAYER = 9
"""Modules with weights in a decoder layer of Llama: four projections of attention, three of the MLP, two norms."""


@dataclass(frozen=True, slots=True)
class Module:
    """A part of the model; what has no parts is placed as a whole."""

    name: str
    num_bytes: int
    parts: tuple["Module", ...] = ()

    def leaves(self) -> Iterator["Module"]:
        """Yield the smallest parts, in order."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True, slots=True)
class Room:
    """A device as accelerate sees it."""

    name: str
    num_bytes: int
    keeps_room: bool
    """Whether space for the largest layer still to come stays free: the first GPU and the CPU."""
    is_gpu: bool = True


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the modules of a Llama-family model."""

    embedding: int
    layers: tuple[int, ...]
    norm: int
    rotary: int
    head: int
    """0 where it is tied: the table then counts with the embedding."""
    is_tied: bool

    @property
    def total(self) -> int:
        """Bytes of the whole model."""
        return self.embedding + sum(self.layers) + self.norm + self.rotary + self.head


def balanced_rooms(sizes: Sizes, *, rooms: Sequence[Room]) -> tuple[Room, ...]:
    """Return the rooms with the GPUs' limits lowered to an equal share, plus a quarter more than the largest block.

    The last GPU keeps its limit, in case the others end up too small.
    """
    gpus = [index for index, room in enumerate(rooms) if room.is_gpu and room.num_bytes > 0]
    if not gpus:
        return tuple(rooms)
    num_leaves = LEAVES_PER_LAYER * len(sizes.layers) + 3 + (not sizes.is_tied)
    buffer = int(1.25 * max(sizes.layers[0], int(sizes.total / num_leaves)))
    share = sizes.total // len(gpus) + buffer
    return tuple(
        Room(room.name, min(share, room.num_bytes), room.keeps_room) if index in gpus[:-1] else room
        for index, room in enumerate(rooms)
    )


def fill(sizes: Sizes, *, rooms: Sequence[Room]) -> Mapping[str, str]:
    """Return the device of every smallest module: ``embedding``, ``layers.0``, ..., ``norm``, ``rotary``, ``head``.

    What fits nowhere is on `DISK`.
    """
    layers = tuple(Module(f"model.layers.{i}", size) for i, size in enumerate(sizes.layers))
    parts = (
        Module("model.embedding", sizes.embedding),
        Module("model.layers", sum(sizes.layers), layers),
        Module("model.norm", sizes.norm),
        Module("model.rotary", sizes.rotary),
    )
    model = Module("model", sizes.total - sizes.head, parts)
    filling = _Filling([model, Module("head", sizes.head)], list(rooms), is_tied=sizes.is_tied)
    filling.run()
    return {name.removeprefix("model."): device for name, device in filling.placed.items()}


@dataclass(slots=True)
class _Filling:
    """The state of one fill."""

    waiting: list[Module]
    rooms: list[Room]
    is_tied: bool
    placed: dict[str, str] = field(default_factory=dict)
    used_bytes: int = 0
    largest_bytes: int = 0
    largest: set[str] = field(default_factory=set)
    """Names of the modules that have the largest size."""

    def run(self) -> None:
        self._find_largest()
        while self.waiting:
            module = self.waiting.pop(0)
            self._take_out(module)
            if self._fits(module):
                self._place(module)
            elif module.parts:
                self.waiting = [*module.parts, *self.waiting]
                self._find_largest()
            else:
                self.waiting.insert(0, module)
                self.rooms.pop(0)
                self.used_bytes = 0

    def _find_largest(self) -> None:
        leaves = [leaf for module in self.waiting for leaf in module.leaves()]
        self.largest_bytes = max((leaf.num_bytes for leaf in leaves), default=0)
        self.largest = {leaf.name for leaf in leaves if leaf.num_bytes == self.largest_bytes}

    def _take_out(self, module: Module) -> None:
        """The room that is kept is for modules still waiting, so the one at hand does not count."""
        self.largest -= {leaf.name for leaf in module.leaves()}
        if not self.largest:
            self._find_largest()

    def _fits(self, module: Module) -> bool:
        if not self.rooms:
            return True  # the disk takes everything
        room = self.rooms[0]
        limit = room.num_bytes - self.largest_bytes * room.keeps_room
        return self.used_bytes + module.num_bytes <= limit

    def _place(self, module: Module) -> None:
        device = self.rooms[0].name if self.rooms else DISK
        self.used_bytes += module.num_bytes
        names = [leaf.name for leaf in module.leaves()]
        if self.is_tied and "model.embedding" in names:
            names.append("head")
            self.waiting = [other for other in self.waiting if other.name != "head"]
        self.placed |= dict.fromkeys(names, device)
