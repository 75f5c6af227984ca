"""Does the error that the ladder expects come true? Ten random mixes of int4 and int8, expected and measured.

Sensitivities are measured on one text, half of Python's own modules; every mix is then measured as a whole on that text
and on another one, the other half, which shows what the choice of a text does. Another checkpoint is measured with
LLAMAPLAN_MODEL.
"""

import os
import random
import statistics
from pathlib import Path

from benchmarks.measure import SHIPPED

MIXES = 10
TOKENS = 2048


def main() -> None:
    """Print a row per mix, and how far expectation and measurement are apart."""
    from planner.measure.sensitivity import Rounding, measure_sensitivity, subject_of, windows_of
    from plans.checkpoint.folder import open_checkpoint
    from plans.sensitivity import PartialSensitivity

    checkpoint = open_checkpoint(Path(os.environ.get("LLAMAPLAN_MODEL", SHIPPED)))
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    text, other = (b"".join(path.read_bytes() for path in modules[half::2]) for half in (0, 1))
    windows, fresh = (windows_of(checkpoint, t, num_tokens=TOKENS, where="text") for t in (text, other))
    subject = subject_of(checkpoint, windows, text, dtype=None)
    known = measure_sensitivity(
        checkpoint, windows, known=PartialSensitivity(subject=subject), keep=lambda _: None, progress=lambda *_: None
    )
    print(f"{subject.name}: int8 {known.int8:.3g}, int4 layer by layer {sum(known.int4):.4g}, head {known.head_int8}")
    rounding = Rounding(checkpoint, dtype=subject.dtype)
    replays = rounding.replay(windows), rounding.replay(fresh)
    draw, ratios = random.Random(0), []
    for _ in range(MIXES):
        bits = tuple(draw.choice((4, 8)) for _ in known.int4)
        expected = sum((known.int4 if b == 4 else known.layer_int8)[i] for i, b in enumerate(bits))
        measured = [replay.divergence(rounding.changes(bits), first=0) for replay in replays]
        ratios.append([found / expected for found in measured])
        shown = ", ".join(f"{found:.4g} ({found / expected:.2f})" for found in measured)
        print(f"{bits.count(4):3} layers in int4: expected {expected:.4g}; on the same text and on another {shown}")
    for name, found in zip(("the same text", "another text"), zip(*ratios, strict=True), strict=True):
        median = statistics.median(found)
        print(f"measured over expected, {name}: {min(found):.2f} to {max(found):.2f}, median {median:.2f}")
