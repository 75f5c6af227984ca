"""The even split: all devices in the order given, layer counts that differ by at most one."""

from dataclasses import replace

from planner.problem.problem import Problem


def uniform_counts(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return layer counts that differ by at most one; earlier stages take the remainder.

    Example:
        >>> uniform_counts(32, 3)
        (11, 11, 10)
    """
    base, extra = divmod(num_layers, num_stages)
    return tuple(base + (i < extra) for i in range(num_stages))


def uniform_problem(problem: Problem) -> Problem:
    """Return the problem whose only chain is the uniform one."""
    counts = uniform_counts(problem.num_layers, problem.num_devices)
    devices = tuple(
        replace(device, rule=replace(device.rule, min_layers=count, max_layers=count))
        for device, count in zip(problem.devices, counts, strict=True)
    )
    return replace(problem, devices=devices, keep_order=True, use_all=True)


def nearest_split(problem: Problem) -> tuple[int, ...] | None:
    """Return the split over all devices in their order that fits and moves the fewest layers; None if none fits.

    Dynamic programming over (device, layers placed); of equally near splits the one with more layers early.
    """
    counts = uniform_counts(problem.num_layers, problem.num_devices)
    last = problem.num_devices - 1
    steps = [problem.decode_hop[device][device + 1] for device in range(last)]
    if None in steps or problem.return_hop[last][0] is None:
        return None
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for device, count in enumerate(counts):
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start, (moved, split) in best.items():
            for end in range(start, problem.num_layers + 1):
                if start == end and 0 < device < last:
                    continue
                if device == last and end != problem.num_layers:
                    continue
                option = (moved + abs(end - start - count), (*split, -(end - start)))
                is_better = end not in reached or option < reached[end]
                if is_better and problem.allows(device, start, end, embedding=device == 0, head=device == last):
                    reached[end] = option
        best = reached
    found = best.get(problem.num_layers)
    return tuple(-count for count in found[1]) if found else None
