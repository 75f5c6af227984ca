"""GPTQ: round the columns of a matrix one after another, and let those to come make up for the error; then improve it.

For inputs X the squared change of the outputs is e H e for an error e of a row of weights, with H = X^T X. With U the
upper Cholesky factor of H^-1, rounding column j leaves least behind if every later column k changes by
- error_j U_jk / U_jj (Frantar et al. 2023, "GPTQ", section 3). A group's scale is chosen when its first column comes,
by least error weighted with 1 / U_jj^2: what an error of column j costs after the others have made up for it.

X comes out of matrices that are packed already, and Y out of the same ones as they were. What is rounded is not W but
the weights V that make of X what is nearest to what W makes of Y, V = W + H^-1 X^T (Y - X) W: a matrix takes back what
those before it did wrong (Li et al. 2025, "GPTAQ", has the same aim).

The rounding is greedy; afterwards every group once more gets the best scale for its numbers and every number the best
value for all others (coordinate descent), which is kept for the rows whose error shrinks.

Shapes: N columns (inputs), R rows (outputs). Weights lie as [N, R]: what is rounded together lies together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from plans.errors import InputError
from plans.packed.scheme import Scheme

DAMPING = 0.01
"""Of the mean diagonal, added to it: little text leaves directions without any input."""
SWEEPS = 2
"""Times that all groups are improved."""
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


@dataclass(frozen=True, slots=True)
class Curvature:
    """What an error of the weights costs, in fp32."""

    hessian: torch.Tensor
    """H = X^T X [N, N], damped."""
    factor: torch.Tensor
    """U [N, N]"""
    missing: torch.Tensor
    """X^T (Y - X) [N, N]"""

    @classmethod
    def of(cls, hessian: torch.Tensor, missing: torch.Tensor, *, name: str) -> "Curvature":
        """Factorise sums in fp64; overwrites `hessian`.

        Raises:
            InputError: (E-VALUES) the activations are not finite.
        """
        diagonal = hessian.diagonal()
        if not bool(torch.isfinite(hessian).all() and torch.isfinite(missing).all()):
            raise InputError("its inputs are NaN or infinite on this text", where=name, code="E-VALUES")
        diagonal[diagonal == 0] = 1  # a column without any input: whatever it holds, nothing comes of it
        diagonal += DAMPING * diagonal.mean()
        lower = torch.linalg.cholesky(hessian)
        factor: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        return cls(hessian.float(), factor.float(), missing.float())

    def wanted(self, columns: torch.Tensor) -> torch.Tensor:
        """Return the weights V [N, R] for W [N, R]."""
        change: torch.Tensor = self.factor.t() @ (self.factor @ (self.missing @ columns))
        return columns + change


def calibrate(weights: torch.Tensor, curvature: Curvature, *, scheme: Scheme, scale: torch.dtype) -> Calibrated:
    """Round a matrix.

    Args:
        weights: [R, N] floating point; not changed.
        curvature: of its inputs.
        scheme: bits and columns per scale.
        scale: dtype of the scales, and of the model that will compute with them.
    """
    assert scheme.group_size is not None
    wanted = curvature.wanted(weights.float().t().contiguous())  # [N, R]
    rounding = _Rounding.of(wanted, scheme, scale)
    rounding.fill(curvature.factor)
    for _ in range(SWEEPS):
        rounding.improve(curvature.hessian)
    return Calibrated(rounding.numbers.to(torch.int8).t().contiguous(), rounding.scales.t().contiguous())


@dataclass(frozen=True, slots=True)
class _Rounding:
    """A matrix that is being rounded."""

    wanted: torch.Tensor
    """[N, R]"""
    numbers: torch.Tensor
    """[N, R] whole numbers in fp32."""
    scales: torch.Tensor
    """[N / 32, R]"""
    errors: torch.Tensor
    """[N, R], of what is stored."""
    scheme: Scheme

    @classmethod
    def of(cls, wanted: torch.Tensor, scheme: Scheme, scale: torch.dtype) -> "_Rounding":
        assert scheme.group_size is not None
        scales = torch.empty(len(wanted) // scheme.group_size, wanted.shape[1], dtype=scale)
        return cls(wanted, torch.empty_like(wanted), scales, torch.empty_like(wanted), scheme)

    def groups(self) -> "Iterator[tuple[slice, torch.Tensor]]":
        """Yield the columns of every group, and its scales, to be filled."""
        assert self.scheme.group_size is not None
        for index, start in enumerate(range(0, len(self.wanted), self.scheme.group_size)):
            yield slice(start, start + self.scheme.group_size), self.scales[index]

    def fill(self, factor: torch.Tensor) -> None:
        """Round column after column."""
        columns = self.wanted.clone()
        for own, scales in self.groups():
            costs = factor.diagonal()[own].square().reciprocal()[:, None]
            scales.copy_(_best_scale(columns[own], costs, self.scheme))
            changes = _round_group(columns[own], factor[own, own], scales, self.numbers[own], self.scheme)
            columns[own.stop :] -= factor[own, own.stop :].t() @ changes
        for own, scales in self.groups():
            self.errors[own] = self.wanted[own] - _stored(self.numbers[own], scales)

    def improve(self, hessian: torch.Tensor) -> None:
        """Improve group after group, given all others."""
        for own, scales in self.groups():
            self._improve_group(own, scales, hessian[own, own], hessian[own] @ self.errors)

    def _improve_group(self, own: slice, scales: torch.Tensor, hessian: torch.Tensor, slopes: torch.Tensor) -> None:
        """Improve a group; the error grows by twice its `slopes` [32, R] per change of its errors, at first."""
        wanted, before, numbers = self.wanted[own], self.errors[own], self.numbers[own].clone()
        found = _scale_of(numbers, scales, hessian, slopes)
        inverse = _inverse(found)
        changes = wanted - _stored(numbers, found) - before
        for place, row in enumerate(hessian):
            slope = slopes[place] + row @ changes
            best = wanted[place] - before[place] - changes[place] + slope / row[place]
            numbers[place] = _rounded(best, inverse, self.scheme)
            changes[place] = wanted[place] - _stored(numbers[place], found) - before[place]
        is_better = (changes * (2 * slopes + hessian @ changes)).sum(0) < 0
        self.numbers[own] = torch.where(is_better, numbers, self.numbers[own])
        scales.copy_(torch.where(is_better, found, scales))
        before += torch.where(is_better, changes, 0)


def _round_group(
    columns: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, numbers: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    """Fill `numbers` with a group of columns; return each one's error over its U_jj [32, R]."""
    errors, inverse = torch.empty_like(columns), _inverse(scales)
    for place, column in enumerate(columns):
        left = column - factor[:place, place] @ errors[:place]
        numbers[place] = _rounded(left, inverse, scheme)
        errors[place] = (left - _stored(numbers[place], scales)) / factor[place, place]
    return errors


def _best_scale(columns: torch.Tensor, costs: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return the scale of least weighted error for a group of columns, one for every row [R]."""
    high, low = columns.amax(0), columns.amin(0)
    first = torch.where(high > -low, high, low) / -(1 << (scheme.bits - 1))
    best, most = torch.zeros_like(first), torch.full_like(first, -1)
    for factor in _FIRST_SCALES[scheme.bits]:
        numbers = _rounded(columns, _inverse(first * factor), scheme)
        weighted = numbers * costs
        mixed, squared = (weighted * columns).sum(0), (weighted * numbers).sum(0)
        found = torch.where(squared > 0, mixed / squared, 0)
        gain = mixed * found
        best, most = torch.where(gain > most, found, best), torch.maximum(gain, most)
    return best


def _scale_of(numbers: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Return the scales [R] of least error for the numbers of a group."""
    squared = (numbers * (hessian @ numbers)).sum(0)
    found = scales.float() + torch.where(squared > 0, (numbers * slopes).sum(0) / squared, 0)
    return found.to(scales.dtype)


def _stored(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return what a model of the scales' dtype computes with, in fp32."""
    return (numbers * scales.float()).to(scales.dtype).float()


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    used = scales.float()
    return torch.where(used.abs() < _TINY, 0, 1 / used)


def _rounded(values: torch.Tensor, inverse: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    half = 1 << (scheme.bits - 1)
    return (values * inverse).round_().clamp_(-half, half - 1)
