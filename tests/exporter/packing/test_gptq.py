"""The arithmetic of calibration, on its own."""

from itertools import pairwise

import pytest
import torch

from exporter.calibrate import gptq
from exporter.calibrate.gptq import Curvature, calibrate
from plans.errors import InputError
from plans.packed.scheme import INT4, INT8, Scheme


def example(rows: int = 24, columns: int = 96, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
    inputs = hidden + 0.3 * torch.randn(tokens, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs


def curvature(inputs: torch.Tensor, originals: torch.Tensor | None = None) -> Curvature:
    own = inputs.double()
    missing = torch.zeros_like(own) if originals is None else originals.double() - own
    return Curvature.of(own.t() @ own, own.t() @ missing, name="x")


def independent() -> Curvature:
    return curvature(torch.eye(96))


def output_error(weights: torch.Tensor, found: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (weights - found).t()).square().sum())


@pytest.mark.parametrize(("scheme", "gain"), [(INT4, 0.3), (INT8, 0.4)])
def test_outputs_change_far_less_than_with_inputs_that_are_taken_for_independent(scheme: Scheme, gain: float) -> None:
    weights, inputs = example()
    informed = calibrate(weights, curvature(inputs), scheme=scheme, scale=torch.bfloat16).weights
    plain = calibrate(weights, independent(), scheme=scheme, scale=torch.bfloat16).weights
    assert output_error(weights, informed, inputs) < gain * output_error(weights, plain, inputs)


def test_independent_inputs_leave_rounding_to_nearest() -> None:
    weights, _ = example()
    found = calibrate(weights, independent(), scheme=INT4, scale=torch.bfloat16)
    scales = found.scales.float().repeat_interleave(32, dim=1)
    assert torch.equal(found.numbers.float(), (weights * (1 / scales)).round().clamp(-8, 7))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scheme", [INT4, INT8])
def test_no_row_is_worse_after_it_was_improved(seed: int, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs = example(seed=seed)
    known = curvature(inputs)
    errors = []
    for sweeps in range(4):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        error = weights.double() - calibrate(weights, known, scheme=scheme, scale=torch.bfloat16).weights
        errors.append(((error @ known.hessian.double()) * error).sum(1))
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
    assert errors[2].sum() < 0.95 * errors[0].sum()


def test_a_matrix_makes_up_for_what_is_missing_in_its_inputs() -> None:
    weights, originals = example()
    noise = torch.randn(originals.shape, generator=torch.Generator().manual_seed(1))
    inputs = 0.95 * originals + 0.1 * noise  # not only noise: some of it can be foreseen

    def distance(known: Curvature) -> float:
        found = calibrate(weights, known, scheme=INT4, scale=torch.bfloat16).weights
        return float((originals @ weights.t() - inputs @ found.t()).square().sum())

    assert distance(curvature(inputs, originals)) < 0.8 * distance(curvature(inputs))


def test_columns_without_any_input_and_rows_of_zeros_stay_finite() -> None:
    weights, inputs = example()
    inputs[:, 40:50], weights[3] = 0, 0
    found = calibrate(weights, curvature(inputs), scheme=INT4, scale=torch.float16)
    assert torch.isfinite(found.weights).all()
    assert not found.weights[3].any()


def test_inputs_that_are_not_finite_are_refused_by_the_modules_name() -> None:
    bad, good = torch.full((32, 32), float("nan"), dtype=torch.float64), torch.eye(32, dtype=torch.float64)
    for hessian, missing in ((bad, good), (good, bad)):
        with pytest.raises(InputError, match=r"up_proj: its inputs are NaN"):
            Curvature.of(hessian, missing, name="up_proj")
