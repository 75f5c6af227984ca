"""GPTQ: round the columns of a matrix one after another, and let those to come make up for the error.

For inputs X the squared change of the outputs is e H e for an error e of a row of weights, with H = X^T X. With U the
upper Cholesky factor of H^-1, rounding column j leaves least behind if every later column k changes by
- error_j U_jk / U_jj (Frantar et al. 2023, "GPTQ", section 3). A group's scale is chosen when its first column comes,
by least error weighted with 1 / U_jj^2: what an error of column j costs after the others have made up for it.

Shapes: N columns (inputs), R rows (outputs). Weights lie as [N, R]: what is rounded together lies together.
"""

from dataclasses import dataclass

import torch

from plans.errors import InputError
from plans.packed.scheme import Scheme

DAMPING = 0.01
"""Of the mean diagonal, added to it: little text leaves directions without any input."""
_FIRST_SCALES = {4: (1.0, 0.9, -8 / 7), 8: (1.0,)}
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A matrix of few bits."""

    numbers: torch.Tensor
    """[R, N] int8"""
    scales: torch.Tensor
    """[R, N / 32] in the dtype they are stored in."""

    @property
    def weights(self) -> torch.Tensor:
        """[R, N] fp32: what a model of the scales' dtype computes with."""
        rows, columns = self.numbers.shape
        grouped = self.numbers.view(rows, self.scales.shape[1], -1).to(self.scales.dtype)
        found: torch.Tensor = (grouped * self.scales[:, :, None]).view(rows, columns).float()
        return found


def inverse_factor(hessian: torch.Tensor, *, name: str) -> torch.Tensor:
    """Return U [N, N], in fp32, of X^T X [N, N] in fp64; overwrites its argument.

    Raises:
        InputError: (E-VALUES) the activations are not finite.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()):
        raise InputError("its inputs are NaN or infinite on this text", where=name, code="E-VALUES")
    diagonal[diagonal == 0] = 1  # a column without any input: whatever it holds, nothing comes of it
    diagonal += DAMPING * diagonal.mean()
    lower = torch.linalg.cholesky(hessian)
    factor: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor.float()


def calibrate(weights: torch.Tensor, factor: torch.Tensor, *, scheme: Scheme, scale: torch.dtype) -> Calibrated:
    """Round a matrix.

    Args:
        weights: [R, N] floating point; not changed.
        factor: U of its inputs, from `inverse_factor`.
        scheme: bits and columns per scale.
        scale: dtype of the scales, and of the model that will compute with them.
    """
    assert scheme.group_size is not None
    columns = weights.float().t().contiguous()  # [N, R]
    numbers = torch.empty_like(columns, dtype=torch.int8)
    scales = torch.empty(len(columns) // scheme.group_size, columns.shape[1], dtype=scale)
    for index, start in enumerate(range(0, len(columns), scheme.group_size)):
        end = start + scheme.group_size
        own, rest = columns[start:end], columns[end:]
        costs = factor.diagonal()[start:end].square().reciprocal()[:, None]
        scales[index] = _best_scale(own, costs, scheme).to(scale)
        errors = _round_group(own, factor[start:end, start:end], scales[index], numbers[start:end], scheme)
        rest -= factor[start:end, end:].t() @ errors
    return Calibrated(numbers.t().contiguous(), scales.t().contiguous())


def _round_group(
    columns: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, numbers: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    """Fill `numbers` with a group of columns, changing the columns; return each one's error over its U_jj [32, R]."""
    errors, used = torch.empty_like(columns), scales.float()
    inverse = torch.where(used.abs() < _TINY, 0, 1 / used)
    for place, column in enumerate(columns):
        rounded = _rounded(column, inverse, scheme)
        numbers[place] = rounded.to(torch.int8)
        stored = (rounded * used).to(scales.dtype).float()
        errors[place] = (column - stored) / factor[place, place]
        columns[place + 1 :] -= factor[place, place + 1 :, None] * errors[place]
    return errors


def _best_scale(columns: torch.Tensor, costs: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return the scale of least weighted error for a group of columns, one for every row [R]."""
    high, low = columns.amax(0), columns.amin(0)
    first = torch.where(high > -low, high, low) / -(1 << (scheme.bits - 1))
    best, most = torch.zeros_like(first), torch.full_like(first, -1)
    for factor in _FIRST_SCALES[scheme.bits]:
        trial = first * factor
        numbers = _rounded(columns, torch.where(trial.abs() < _TINY, 0, 1 / trial), scheme)
        weighted = numbers * costs
        mixed, squared = (weighted * columns).sum(0), (weighted * numbers).sum(0)
        found = torch.where(squared > 0, mixed / squared, 0)
        gain = mixed * found
        best, most = torch.where(gain > most, found, best), torch.maximum(gain, most)
    return best


def _rounded(values: torch.Tensor, inverse: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    half = 1 << (scheme.bits - 1)
    return (values * inverse).round_().clamp_(-half, half - 1)
