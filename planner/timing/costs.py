"""The time model: seconds of units, hops and stages, and what a whole chain is predicted to do.

Decode is taken at the context prompt + new / 2; prefill runs chunk by chunk, each over the chunks before it. The head
computes the logits of the last position only, so it runs once per prompt. Identical layers cost identical floats.

    seconds per token (one batch in flight) = sum of stage decode times + hops + return hop
    step period with N batches in flight    = max(slowest stage, slowest hop, busiest memory bus, seconds per token / N)
    memory bus of a host                    : sum over its CPU stages of bytes read / what the host's CPUs read together
    time to first token, one process        = sum of all chunks over all stages and hops
    time to first token, process per stage  : arrive[s, c] = max(finish[s-1, c], arrive[s, c-1]) + hop
                                              finish[s, c] = max(arrive[s, c], finish[s, c-1]) + t[s, c]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from planner.timing.roofline import Work, bytes_read
from planner.timing.topology import Topology
from planner.timing.unit_times import UnitTimes
from plans.cluster import Cluster
from plans.dtypes import DTYPES
from plans.errors import InfeasibleError, InputError
from plans.memory import device_overhead_bytes, stage_memory
from plans.plan import Execution, Prediction
from plans.profile import ModelProfile, UnitProfile
from plans.stages import StageRange
from plans.workload import Workload

TOKEN_ID_BYTES = 8
"""A token id travels as int64."""
MAX_SECONDS = 1e6


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Times of one stage, as a plan records them; the hop leads to the next stage and is 0 for the last."""

    decode_seconds: float
    prefill_seconds: float
    hop_seconds: float


class CostModel:
    """Seconds of units, hops and stages for one profile, workload and cluster.

    Args:
        profile: the model.
        workload: what is asked of it.
        cluster: devices and links; budgets play no role here.
        execution: whether stages share a process; decides only what is assumed where no link is stated.
    """

    def __init__(
        self, profile: ModelProfile, *, workload: Workload, cluster: Cluster, execution: Execution = "one_process"
    ) -> None:
        self.profile = profile
        self.workload = workload
        self.cluster = cluster
        self.execution: Execution = execution
        self.topology = Topology(cluster, execution=execution)
        self._times = {d.name: UnitTimes(d, profile=profile, workload=workload) for d in cluster.devices}
        self._chunks = workload.prefill_chunks
        self.buses = _buses(cluster)
        """Names of the CPU devices that share a host's memory bus, by host; only where its bandwidth is known."""

    def decode_seconds(self, unit: UnitProfile, device: str) -> float:
        """Return the time of `unit` on `device` for one decode step of B sequences."""
        return self._times[device].decode(unit, context=self.workload.decode_context_tokens).seconds

    def prefill_seconds(self, unit: UnitProfile, device: str) -> tuple[float, ...]:
        """Return the time of `unit` for each chunk of `workload.prefill_chunks`; the head works on the last alone."""
        times = self._times[device]
        seconds = [times.prefill(unit, tokens=tokens, past=past).seconds for tokens, past in self._chunks]
        return (*([0.0] * (len(seconds) - 1)), seconds[-1]) if unit.kind == "head" else tuple(seconds)

    def bus_seconds(self, unit: UnitProfile, host: str, *, work: Work | None = None) -> float:
        """Return how long the memory bus of a host is busy with `unit`, by default in a decode step of B sequences."""
        bandwidth = next(h.memory_bandwidth_bytes_per_second for h in self.cluster.hosts if h.name == host)
        assert bandwidth is not None, f"{host} is no host of `buses`"
        decode = Work(1, self.workload.decode_context_tokens - 1, self.workload.batch_size)
        return bytes_read(unit, work=work or decode, profile=self.profile) / bandwidth

    def stages_bus_seconds(self, stages: Sequence[StageRange]) -> tuple[float, ...]:
        """Return, for every bus, how long it is busy in a decode step of a chain."""
        return tuple(
            math.fsum(
                self.bus_seconds(unit, host)
                for stage in stages
                if stage.device in names
                for unit in stage.units(self.profile)
            )
            for host, names in self.buses.items()
        )

    def is_measured(self, unit: UnitProfile, device: str) -> bool:
        """Return whether `device` has measured decode times for `unit`."""
        return self._times[device].is_measured(unit)

    def is_extrapolated(self, unit: UnitProfile, device: str) -> bool:
        """Return whether the decode time of `unit` lies beyond what was measured on `device`."""
        return self._times[device].decode(unit, context=self.workload.decode_context_tokens).is_extrapolated

    def hop_seconds(self, from_device: str, to_device: str, num_bytes: int) -> float:
        """Return the time of a message; 0 to itself, infinity where the devices are not connected."""
        return self.topology.seconds(from_device, to_device, num_bytes)

    def hidden_bytes(self, num_tokens: int) -> int:
        """Return the bytes of hidden states of B sequences of `num_tokens` each."""
        width = DTYPES[self.workload.dtype].size_bytes
        return self.workload.batch_size * num_tokens * self.profile.model.hidden_size * width

    def decode_hop_seconds(self, from_device: str, to_device: str) -> float:
        """Return the time to pass one decode step's hidden states on."""
        return self.hop_seconds(from_device, to_device, self.hidden_bytes(1))

    def prefill_hop_seconds(self, from_device: str, to_device: str, chunk_tokens: int) -> float:
        """Return the time to pass the hidden states of a prefill chunk of `chunk_tokens` on."""
        return self.hop_seconds(from_device, to_device, self.hidden_bytes(chunk_tokens))

    def return_hop_seconds(self, last_device: str, first_device: str) -> float:
        """Return the time for B token ids to travel from the last stage back to the first."""
        return self.hop_seconds(last_device, first_device, TOKEN_ID_BYTES * self.workload.batch_size)

    def stage_decode_seconds(self, stage: StageRange) -> float:
        """Return the decode time of a whole stage, correctly rounded: n equal layers cost exactly n times one."""
        return math.fsum(self.decode_seconds(unit, stage.device) for unit in stage.units(self.profile))

    def stage_prefill_seconds(self, stage: StageRange) -> tuple[float, ...]:
        """Return the time of a whole stage for each prefill chunk."""
        per_unit = [self.prefill_seconds(unit, stage.device) for unit in stage.units(self.profile)]
        return tuple(math.fsum(times[chunk] for times in per_unit) for chunk in range(len(self._chunks)))


def _buses(cluster: Cluster) -> dict[str, tuple[str, ...]]:
    """CPU devices by host, of hosts that say how much they read together; one device alone shares with nobody."""
    of_host = {
        host.name: tuple(d.name for d in cluster.devices if d.host == host.name and d.kind == "cpu")
        for host in cluster.hosts
        if host.memory_bandwidth_bytes_per_second is not None
    }
    return {host: names for host, names in of_host.items() if len(names) > 1}


def predict(
    profile: ModelProfile,
    *,
    workload: Workload,
    cluster: Cluster,
    stages: Sequence[StageRange],
    execution: Execution = "one_process",
) -> tuple[tuple[StageSeconds, ...], Prediction]:
    """Predict a chain; all devices must have budgets (see `planner.devices.machine.with_budgets`).

    Raises:
        InfeasibleError: two neighbours, or the last stage and the first, are not connected.
        InputError: the cluster's rates are so low that a step takes longer than can be recorded.
    """
    return predict_chain(CostModel(profile, workload=workload, cluster=cluster, execution=execution), stages=stages)


def predict_chain(model: CostModel, *, stages: Sequence[StageRange]) -> tuple[tuple[StageSeconds, ...], Prediction]:
    """Predict a chain with a cost model at hand; errors as `predict`."""
    decode = [model.stage_decode_seconds(stage) for stage in stages]
    prefill = [model.stage_prefill_seconds(stage) for stage in stages]
    pairs = [(a.device, b.device) for a, b in pairwise(stages)]
    hops = [model.decode_hop_seconds(a, b) for a, b in pairs]
    return_hop = model.return_hop_seconds(stages[-1].device, stages[0].device)
    cycle = math.fsum([*decode, *hops, return_hop])
    in_flight = model.workload.requests_in_flight
    period = max(*decode, *hops, return_hop, *model.stages_bus_seconds(stages), cycle / in_flight)
    first_token = _first_token_seconds(model, prefill, pairs)
    _check_times(model, [*pairs, (stages[-1].device, stages[0].device)], cycle + first_token)
    prediction = Prediction(
        time_to_first_token_seconds=first_token,
        seconds_per_token=cycle,
        return_hop_seconds=return_hop,
        tokens_per_second=model.workload.batch_size / max(cycle, 1e-12),
        pipelined_tokens_per_second=model.workload.batch_size / max(period, 1e-12),
        max_memory_share=max(_memory_share(model, stage) for stage in stages),
    )
    times = zip(decode, prefill, [*hops, 0.0], strict=True)
    return tuple(StageSeconds(d, math.fsum(p), hop) for d, p, hop in times), prediction


def _first_token_seconds(
    model: CostModel, prefill: Sequence[Sequence[float]], pairs: Sequence[tuple[str, str]]
) -> float:
    chunks = model.workload.prefill_chunks
    hops = [[model.prefill_hop_seconds(a, b, tokens) for tokens, _past in chunks] for a, b in pairs]
    if model.execution == "one_process":
        return math.fsum(seconds for row in (*prefill, *hops) for seconds in row)
    finish = [0.0] * len(chunks)  # when each chunk has left the stage before
    for stage, times in enumerate(prefill):
        free = link_free = 0.0  # when this stage, and the link to it, are done with the chunk before
        for chunk, seconds in enumerate(times):
            if stage:
                link_free = max(finish[chunk], link_free) + hops[stage - 1][chunk]
            free = finish[chunk] = max(link_free, free) + seconds
    return finish[-1]


def _check_times(model: CostModel, pairs: Sequence[tuple[str, str]], seconds: float) -> None:
    for a, b in pairs:
        if math.isinf(model.hop_seconds(a, b, 1)):
            raise InfeasibleError(model.topology.explain(a, b), code="E-LINK")
    if not seconds <= MAX_SECONDS:
        raise InputError(
            f"a request would take {seconds:.3g} seconds to its second token",
            expected=f"at most {MAX_SECONDS:.0e}",
            hint="check the rates and bandwidths of the cluster",
            code="E-RATES",
        )


def _memory_share(model: CostModel, stage: StageRange) -> float:
    device = model.cluster.device(stage.device)
    is_process_per_stage = model.execution == "process_per_stage"
    needed = stage_memory(
        model.profile,
        workload=model.workload,
        stage=stage,
        overhead_bytes=device_overhead_bytes(device, model.cluster, is_process_per_stage=is_process_per_stage),
    )
    assert device.budget_bytes is not None, f"{device.name} has no budget"
    return needed.total_bytes / device.budget_bytes if device.budget_bytes else math.inf
