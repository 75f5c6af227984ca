"""Measured curves of one shape -> rates that hold for any shape: what remains of them when another model is planned."""

from statistics import median

from planner.timing.roofline import Work, bytes_read, flops
from plans.cluster import Device, Timings
from plans.profile import ModelProfile


def with_measured_rates(device: Device, timings: Timings, *, profile: ModelProfile) -> Device:
    """Return the device with bandwidth and FLOP rate as its timings of one shape show them.

    Bandwidth is what decoding one sequence reads per second, the rate what the longest prompts compute per second;
    both include all overhead, so the fixed overhead of a unit becomes 0.

    Args:
        device: the device that was timed.
        timings: its curves.
        profile: the shape they belong to.
    """
    layer = profile.layers[0]
    reads = [
        bytes_read(layer, work=Work(1, context - 1, batch), profile=profile) / seconds
        for context, batch, seconds in timings.decode_seconds_per_layer
        if batch == 1 and seconds
    ]
    longest = max(tokens for tokens, _past, _batch, _seconds in timings.prefill_seconds_per_layer)
    computes = [
        flops(layer, work=Work(tokens, past, batch)) / seconds
        for tokens, past, batch, seconds in timings.prefill_seconds_per_layer
        if tokens == longest and seconds
    ]
    rates = dict(device.flops_per_second) | {timings.dtype: median(computes)}
    return device.model_copy(
        update={
            "memory_bandwidth_bytes_per_second": median(reads),
            "flops_per_second": rates,
            "unit_overhead_seconds": 0.0,
        }
    )
