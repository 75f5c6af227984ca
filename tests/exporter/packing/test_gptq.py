"""The arithmetic of calibration, on its own."""

import pytest
import torch

from exporter.calibrate.gptq import calibrate, inverse_factor
from plans.errors import InputError
from plans.packed.scheme import INT4, INT8, Scheme


def example(rows: int = 24, columns: int = 96, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and inputs that depend on each other."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
    inputs = hidden + 0.3 * torch.randn(tokens, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs


def output_error(weights: torch.Tensor, found: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (weights - found).t()).square().sum())


@pytest.mark.parametrize(("scheme", "gain"), [(INT4, 0.35), (INT8, 0.5)])
def test_outputs_change_far_less_than_with_inputs_that_are_taken_for_independent(scheme: Scheme, gain: float) -> None:
    weights, inputs = example()
    seen = inputs.double().t() @ inputs.double()
    informed = calibrate(weights, inverse_factor(seen, name="x"), scheme=scheme, scale=torch.bfloat16).weights
    blind = inverse_factor(torch.eye(96, dtype=torch.float64), name="x")
    plain = calibrate(weights, blind, scheme=scheme, scale=torch.bfloat16).weights
    assert output_error(weights, informed, inputs) < gain * output_error(weights, plain, inputs)


def test_independent_inputs_leave_rounding_to_nearest() -> None:
    weights, _ = example()
    blind = inverse_factor(torch.eye(96, dtype=torch.float64), name="x")
    found = calibrate(weights, blind, scheme=INT4, scale=torch.bfloat16)
    scales = found.scales.float().repeat_interleave(32, dim=1)
    assert torch.equal(found.numbers.float(), (weights * (1 / scales)).round().clamp(-8, 7))


def test_columns_without_any_input_and_rows_of_zeros_stay_finite() -> None:
    weights, inputs = example()
    inputs[:, 40:50], weights[3] = 0, 0
    factor = inverse_factor(inputs.double().t() @ inputs.double(), name="x")
    found = calibrate(weights, factor, scheme=INT4, scale=torch.float16)
    assert torch.isfinite(found.weights).all()
    assert not found.weights[3].any()


def test_inputs_that_are_not_finite_are_refused_by_the_modules_name() -> None:
    hessian = torch.full((32, 32), float("nan"), dtype=torch.float64)
    with pytest.raises(InputError, match=r"up_proj: its inputs are NaN"):
        inverse_factor(hessian, name="up_proj")
