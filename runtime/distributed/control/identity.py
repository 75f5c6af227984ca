"""What must be equal in every process of a run, and one stage's view of what it is given."""

import sys
from importlib.metadata import version

from plans.errors import PeerError
from plans.reading.files import sha256_hex
from runtime.distributed.control.messages import PROTOCOL, Identity
from runtime.reading.opening import Source

_WORDS = {
    "protocol": "protocol version",
    "version": "llamaplan version",
    "torch": "torch version",
    "byte_order": "byte order",
    "model_id": "export id",
    "plan_sha256": "plan",
    "num_stages": "number of stages",
}


def identity_of(source: Source) -> Identity:
    """Return the identity of what this process was given."""
    return Identity(
        protocol=PROTOCOL,
        version=version("llamaplan"),
        torch=version("torch").partition("+")[0],
        byte_order=sys.byteorder,
        model_id=source.export.export_id if source.export else _checkpoint_id(source),
        plan_sha256=source.plan.sha256 if source.plan else "",
        num_stages=len(source.stages),
    )


def check_identity(ours: Identity, theirs: Identity, *, who: str) -> None:
    """Require that another process was given the same.

    Raises:
        PeerError: naming both values of the first difference.
    """
    for name, word in _WORDS.items():
        here, there = getattr(ours, name), getattr(theirs, name)
        if here != there:
            raise PeerError(
                f"{who} has {word} {there}, the driver has {here}",
                hint="give every process the same export and the same versions",
                code="E-IDENTITY",
            )


def _checkpoint_id(source: Source) -> str:
    headers = [shard.header.header_sha256 for shard in source.checkpoint.shards]
    return sha256_hex(" ".join([source.checkpoint.config.sha256, *headers]).encode())
