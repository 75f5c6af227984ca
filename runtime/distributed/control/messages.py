"""What driver and workers tell each other over the control connection, as strict models.

Hidden states and token ids never come this way; see `runtime.distributed.links`.
"""

import signal
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter

from plans.errors import ExitCode, PeerError
from plans.reading.strict import MAX_KEYS, StrictModel, parse_json
from runtime.steps.parts import Natural, Opening

PROTOCOL = 4
"""Version of both planes; driver and workers must agree."""

Text = Annotated[str, Field(max_length=4000)]
Rank = Annotated[int, Field(ge=0, le=65535)]
ENDED = "E-ENDED"
"""Code of a worker that was told to end: as good as lost, but it could say so."""


class Identity(StrictModel):
    """What must be the same in every process of a run."""

    protocol: int
    version: Text
    torch: Text
    byte_order: Text
    model_id: Text
    """The export id; for a plan with its checkpoint, hashes of both."""
    plan_sha256: Text
    num_stages: Rank


class Join(StrictModel):
    """Worker: the first message."""

    kind: Literal["join"] = "join"
    rank: Rank
    host: Text
    pid: Natural
    identity: Identity


class Job(StrictModel):
    """Driver: the answer to a join that is accepted."""

    kind: Literal["job"] = "job"
    dtype: Text
    kv_cache_dtype: Text
    device: Text | None
    """Where the stage goes if not where the plan says."""
    threads: Natural | None
    verifies: bool
    cache_tokens: Natural
    batch_size: Natural
    speed: Text
    heartbeat_timeout_seconds: float
    traces: bool
    """Whether every step is kept for a trace."""


class Refused(StrictModel):
    """Driver: the answer to a join that is not accepted."""

    kind: Literal["refused"] = "refused"
    exit_code: int
    line: Text


class Progress(StrictModel):
    """Worker: what it is doing."""

    kind: Literal["progress"] = "progress"
    text: Text


class Ready(StrictModel):
    """Worker: the stage is loaded, or free of an earlier epoch, and the data plane can be formed."""

    kind: Literal["ready"] = "ready"
    device: Text
    load_seconds: float
    decode_read_bytes: Natural


class Form(StrictModel):
    """Driver: connect to the neighbours. A later epoch replaces an earlier one and all that belonged to it."""

    kind: Literal["form"] = "form"
    epoch: Natural
    uses_nccl: bool


class Put(StrictModel):
    """Both ways: an entry of the shared store through which torch.distributed finds the other processes."""

    kind: Literal["put"] = "put"
    key: Text
    value: Annotated[str, Field(max_length=65536)]
    """Base64."""


class Linked(StrictModel):
    """Worker: its end of one link is connected."""

    kind: Literal["linked"] = "linked"
    epoch: Natural
    link: Rank
    """The rank that sends on it."""


class Formed(StrictModel):
    """Worker: connected to both neighbours."""

    kind: Literal["formed"] = "formed"
    epoch: Natural


class Open(StrictModel):
    """Driver: a sequence; its first step may only come after this."""

    kind: Literal["open"] = "open"
    opening: Opening


class LinkCounts(StrictModel):
    """What one process has sent to the next and received from the previous one since they connected."""

    epoch: Natural
    sent: Natural
    """Messages begun."""
    received: Natural
    """Messages that arrived in full."""
    received_bytes: Natural
    """Bytes that the previous process's connection has brought, those of a message under way included."""
    is_waiting: bool
    """Whether this process waits for more of them."""


class Beat(StrictModel):
    """Both ways, all the time: still here. A connected worker adds how far its data has come."""

    kind: Literal["beat"] = "beat"
    counts: LinkCounts | None = None


class Failed(StrictModel):
    """Worker: it cannot go on, and why. Its last message."""

    kind: Literal["failed"] = "failed"
    exit_code: int
    code: Text
    line: Text


def ended_by(number: int) -> Failed:
    """Return the last message of a worker that a signal ends."""
    name = signal.Signals(number).name
    if number == signal.SIGINT:
        return Failed(exit_code=ExitCode.INTERRUPTED, code="E-INTERRUPTED", line=f"was interrupted by {name}")
    return Failed(exit_code=ExitCode.PEER, code=ENDED, line=f"was ended by {name}")


class Broken(StrictModel):
    """Worker: the data connection to a neighbour broke; the driver finds out who is to blame."""

    kind: Literal["broken"] = "broken"
    epoch: Natural
    peer: Rank
    text: Text


class Abort(StrictModel):
    """Driver: the run is over because of an error."""

    kind: Literal["abort"] = "abort"
    exit_code: int
    line: Text


class Ask(StrictModel):
    """Driver: send the numbers so far."""

    kind: Literal["ask"] = "ask"
    request: Natural


class StepTime(StrictModel):
    """One step of one stage, in seconds of its host's clock since 1970."""

    sequence: Natural
    """The first one in the step."""
    step: Natural
    is_prefill: bool
    start_seconds: float
    end_seconds: float


class Numbers(StrictModel):
    """Worker: seconds spent since the last time it was asked."""

    kind: Literal["numbers"] = "numbers"
    request: Natural
    prefill_compute_seconds: float
    prefill_hop_seconds: float
    decode_compute_seconds: float
    decode_hop_seconds: float
    decode_fast_steps: Natural
    """Decode steps of a stage that uses the native kernels."""
    peak_memory_bytes: Natural
    steps: tuple[StepTime, ...]


class Finish(StrictModel):
    """Driver: everything has been received; leave."""

    kind: Literal["finish"] = "finish"


class Finished(StrictModel):
    """Worker: the acknowledgement of `Finish`."""

    kind: Literal["finished"] = "finished"


Message = (
    Join | Job | Refused | Progress | Ready | Form | Put | Linked | Formed | Open | Beat | Failed | Broken | Abort
    | Ask | Numbers | Finish | Finished
)  # fmt: skip

_KINDS: tuple[str, ...] = tuple(kind.model_fields["kind"].default for kind in get_args(Message))

_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def encode(message: Message) -> bytes:
    """Return a message as JSON bytes."""
    return message.model_dump_json().encode()


def decode(data: bytes) -> Message:
    """Read a message.

    Raises:
        PeerError: not one of ours.
    """
    try:
        message = parse_json(data, where="control connection", max_values=len(data), max_keys=MAX_KEYS)
        # pydantic would quote what it is instead
        if not isinstance(message, dict) or message.get("kind") not in _KINDS:
            raise ValueError("no message")
        return _ADAPTER.validate_json(data)
    except ValueError as error:  # ours and pydantic's are both ValueErrors
        first = str(error).splitlines()[0]
        raise PeerError(f"the other end of the control connection sent something else: {first}") from None
