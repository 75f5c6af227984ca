"""Decoding with a KV cache against computing everything again for every token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.stages import StageRange
from runtime import load

pytestmark = pytest.mark.row("R15")

CUT = (
    StageRange("cpu", 0, 3, has_embedding=True, has_head=False),
    StageRange("cpu", 3, 7, has_embedding=False, has_head=True),
)
TOLERANCE = {"fp32": 1e-4, "bf16": 0.5}
"""Largest difference of a logit: sums run in another order, and bf16 rounds what they give between layers."""

TOKENS = st.lists(st.integers(3, 2047), min_size=2, max_size=24)


@pytest.fixture(scope="module", params=TOLERANCE)
def chain(request: pytest.FixtureRequest, shipped: Path) -> Any:
    return request.param, load(shipped, stages=CUT, dtype=request.param)


@settings(max_examples=20)
@given(token_ids=TOKENS, data=st.data())
def test_logits_from_the_cache_are_those_of_the_whole_text(
    chain: Any, token_ids: list[int], data: st.DataObject
) -> None:
    dtype, model = chain
    kept = data.draw(st.integers(1, len(token_ids) - 1))
    ids = torch.tensor([token_ids])
    with torch.inference_mode():
        cache = model(ids[:, :kept], use_cache=True).past_key_values
        step = model(ids[:, kept:], past_key_values=cache).logits
        again = model(ids, use_cache=False).logits[:, kept:]
    torch.testing.assert_close(step, again, rtol=0, atol=TOLERANCE[dtype])
    if dtype == "fp32":
        assert torch.equal(step.argmax(-1), again.argmax(-1))
