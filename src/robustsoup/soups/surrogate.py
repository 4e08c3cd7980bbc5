"""The surrogate of the map: accuracies of all soups, predicted from the few that were attacked.

The model works on the logit scale. Its mean is linear in the coefficients and in covariates that
were measured for every soup (clean accuracy, survivors of a short attack); the rest is a Gaussian
process over the simplex, or a Scheffé polynomial of degree 2, the plain alternative. Both are
Gaussian models, so every prediction is linear in the measured values: a refit on resampled values
costs one product of matrices, and leave-one-out predictions have a closed form.

Nothing is chosen by hand from the few values: the scales of the model are averaged over a small
lattice, weighted by their marginal likelihood. All arithmetic is float64.

Sources: Rasmussen and Williams 2006, chapters 2, 5.4.2 (leave-one-out) and 2.7 (linear mean);
Scheffé 1958, JRSS B 20:344 (polynomials over a simplex).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
"""An array of float64."""

Model = Literal["gaussian-process", "quadratic"]

LENGTHS = (0.3, 0.6, 1.2)
"""Length scales of the process, in units of coefficients; corners are sqrt(2) apart."""
HEIGHTS = (0.02, 0.06, 0.2, 0.6)
"""Standard deviations of the process or the polynomial around the linear mean, in logits."""
NOISES = (0.005, 0.015, 0.05)
"""Standard deviations of the roughness of single soups, in logits."""
MEAN_SCALE = 10.0
LINEAR_SCALE = 1.0
"""Prior standard deviations of the mean and of its slopes, in logits: wide."""
PRIOR_MISFITS = 4
"""Leave-one-out residuals as large as the model states that the calibration starts from."""


@dataclass(frozen=True)
class Places:
    """Where the model predicts: the coefficients and the covariates of N soups.

    Attributes:
        coefficients: (N, n) coefficients of n ingredients; a dial's t is (N, 2), as t and 1 - t.
        covariates: (N, q) measured values on the logit scale; q may be 0.
    """

    coefficients: Floats
    covariates: Floats

    @classmethod
    def of(cls, coefficients: Sequence[Sequence[float]], *covariates: Floats) -> "Places":
        """Return places with covariates (N,), standardised; constant ones are left out."""
        columns = [
            (values - values.mean()) / values.std()
            for values in covariates
            if float(values.std()) > 1e-9
        ]
        array = np.asarray(coefficients, dtype=np.float64)
        return cls(array, np.stack(columns, 1) if columns else np.zeros((len(array), 0)))

    def __len__(self) -> int:
        """Return the number of soups."""
        return len(self.coefficients)


@dataclass(frozen=True)
class FittedMap:
    """A model fitted to the values of m attacked soups; predicts those of all N soups.

    Attributes:
        attacked: (m,) rows of the soups that the model is fitted to.
        values: (m,) their values, in logits.
        weights: (N, m) with which centred values become predictions.
        variance: (N,) variance of the predictions, calibrated by the leave-one-out residuals.
        noise: Variance of the roughness of single soups, in logits squared, calibrated.
        residuals: (m,) measured minus leave-one-out prediction, in logits.
        misfit: Mean square of the leave-one-out residuals over the variance that the model states
            for them; 1 if the model is as uncertain as it should be.
    """

    attacked: NDArray[np.int64]
    values: Floats
    weights: Floats
    variance: Floats
    noise: float
    residuals: Floats
    misfit: float
    _parts: "tuple[_Part, ...]"
    _places: Places

    def predict(self, values: Floats | None = None) -> Floats:
        """Return predictions (..., N) in logits.

        Args:
            values: (..., m) values of the attacked soups; those of the fit if None.
        """
        values = self.values if values is None else values
        mean = values.mean(-1, keepdims=True)
        return mean + (values - mean) @ self.weights.T

    def draw(self, rows: NDArray[np.int64], normals: Floats) -> Floats:
        """Return draws (b, r) of the error of the predictions at some rows.

        Args:
            rows: (r,) rows of the soups.
            normals: (b, r) standard normal draws.
        """
        covariance = sum(
            part.share * part.covariance(self._places, self.attacked, rows) for part in self._parts
        )
        values, vectors = np.linalg.eigh(np.asarray(covariance) * self.calibration)
        root = vectors * np.sqrt(np.clip(values, 0, None))
        return normals @ root.T

    @property
    def calibration(self) -> float:
        """The factor by which the model's variances are widened, or narrowed a little."""
        return calibrate(self.misfit, len(self.values))


def calibrate(misfit: float, count: int) -> float:
    """Return the factor for the model's variances: the misfit of `count` residuals, shrunk to 1."""
    return (misfit * count + PRIOR_MISFITS) / (count + PRIOR_MISFITS)


@dataclass(frozen=True)
class _Scales:
    """One point of the lattice of scales."""

    model: Model
    length: float
    height: float
    noise: float


@dataclass(frozen=True)
class _Part:
    """The model at one point of the lattice, with its share of the average."""

    scales: _Scales
    inverse: Floats
    share: float

    def covariance(
        self, places: Places, attacked: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> Floats:
        """Return the covariance (r, r) of the errors at some rows."""
        cross = _kernel(places, rows, attacked, self.scales)
        return _kernel(places, rows, rows, self.scales) - cross @ self.inverse @ cross.T


def fit_map(
    places: Places,
    attacked: Sequence[int],
    values: Sequence[float] | Floats,
    model: Model = "gaussian-process",
) -> FittedMap:
    """Fit the model to the values of the attacked soups.

    Args:
        places: All N soups.
        attacked: Rows of m attacked soups, each once; at least 2.
        values: (m,) their values, in logits.
        model: The Gaussian process, or the quadratic.

    Returns:
        Predictions for all N soups with their uncertainty.
    """
    rows = np.asarray(attacked, dtype=np.int64)
    measured = np.asarray(values, dtype=np.float64)
    centred = measured - measured.mean()
    lengths = LENGTHS if model == "gaussian-process" else LENGTHS[:1]
    lattice = [_Scales(model, *point) for point in itertools.product(lengths, HEIGHTS, NOISES)]
    fits = [_fit_at(places, rows, centred, scales) for scales in lattice]
    evidence = np.array([fit.evidence for fit in fits])
    shares = np.exp(evidence - evidence.max())
    shares /= shares.sum()
    residuals = sum(share * fit.residuals for share, fit in zip(shares, fits, strict=True))
    stated = sum(share * fit.stated for share, fit in zip(shares, fits, strict=True))
    misfit = float(np.mean(np.square(residuals) / stated))
    factor = calibrate(misfit, len(rows))
    variance = sum(share * fit.variance for share, fit in zip(shares, fits, strict=True))
    noise = sum(share * fit.scales.noise**2 for share, fit in zip(shares, fits, strict=True))
    return FittedMap(
        attacked=rows,
        values=measured,
        weights=np.asarray(sum(s * fit.weights for s, fit in zip(shares, fits, strict=True))),
        variance=np.asarray(variance) * factor,
        noise=float(noise) * factor,
        residuals=np.asarray(residuals),
        misfit=misfit,
        _parts=tuple(
            _Part(fit.scales, fit.inverse, float(share))
            for share, fit in zip(shares, fits, strict=True)
            if share > 1e-3
        ),
        _places=places,
    )


@dataclass(frozen=True)
class _Fit:
    """The fit at one point of the lattice, with the variances that the model states."""

    scales: _Scales
    inverse: Floats
    weights: Floats
    variance: Floats
    residuals: Floats
    stated: Floats
    evidence: float


def _fit_at(places: Places, rows: NDArray[np.int64], centred: Floats, scales: _Scales) -> _Fit:
    everywhere = np.arange(len(places))
    gram = _kernel(places, rows, rows, scales) + scales.noise**2 * np.eye(len(rows))
    inverse: Floats = np.linalg.inv(gram).astype(np.float64)
    cross = _kernel(places, everywhere, rows, scales)
    weights = cross @ inverse
    variance = _kernel_diagonal(places, scales) - np.einsum("ij,ij->i", weights, cross)
    precision = np.diag(inverse)
    solved = inverse @ centred
    _, log_determinant = np.linalg.slogdet(gram)
    evidence = -0.5 * (float(centred @ solved) + float(log_determinant))
    return _Fit(
        scales,
        inverse,
        weights,
        np.clip(variance, 0, None),
        solved / precision,
        1 / precision,
        evidence,
    )


def _kernel(places: Places, a: NDArray[np.int64], b: NDArray[np.int64], scales: _Scales) -> Floats:
    """Return the prior covariance (a, b) of the values at two sets of rows."""
    left, right = places.coefficients[a], places.coefficients[b]
    n = left.shape[1]
    linear = (left - 1 / n) @ (right - 1 / n).T + places.covariates[a] @ places.covariates[b].T
    total = MEAN_SCALE**2 + LINEAR_SCALE**2 * linear
    if scales.model == "quadratic":
        return total + scales.height**2 * _scheffe_terms(left) @ _scheffe_terms(right).T
    squares = np.square(left[:, None] - right[None]).sum(-1)
    return total + scales.height**2 * np.exp(-squares / (2 * scales.length**2))


def _kernel_diagonal(places: Places, scales: _Scales) -> Floats:
    alpha = places.coefficients
    n = alpha.shape[1]
    linear = np.square(alpha - 1 / n).sum(1) + np.square(places.covariates).sum(1)
    total = MEAN_SCALE**2 + LINEAR_SCALE**2 * linear
    if scales.model == "quadratic":
        return total + scales.height**2 * np.square(_scheffe_terms(alpha)).sum(1)
    return total + scales.height**2


def _scheffe_terms(alpha: Floats) -> Floats:
    """Return 4 alpha_i alpha_j (N, n (n - 1) / 2), each 1 halfway between two corners."""
    i, j = np.triu_indices(alpha.shape[1], 1)
    return 4 * alpha[:, i] * alpha[:, j]


def to_logit(hits: Floats, n: int) -> Floats:
    """Return counts out of n as logits; half a sample keeps 0 and n finite."""
    return np.log((hits + 0.5) / (n - hits + 0.5))


def to_share(logit: Floats) -> Floats:
    """Return the accuracy of a logit."""
    return 1 / (1 + np.exp(-logit))


def fit_p_value(fitted: FittedMap, tests: Sequence[int], values: Sequence[float]) -> float:
    """Return the p-value of the test that the model predicts soups that it has not seen.

    The mean square of the test soups' standardised errors, over 1 or the mean square of the
    leave-one-out residuals, is compared with the F distribution with (number of tests) and m
    degrees of freedom. For two tests its tail is (1 + 2 f / m) ** (-m / 2).

    Args:
        fitted: The model, fitted without the test soups.
        tests: Rows of two test soups.
        values: Their measured values, in logits.

    Raises:
        ValueError: For another number of tests.
    """
    if len(tests) != 2:
        raise ValueError(f"fit_p_value: got {len(tests)} test soups, expected 2")
    rows = np.asarray(tests, dtype=np.int64)
    errors = np.asarray(values) - fitted.predict()[rows]
    stated = fitted.variance[rows] + fitted.noise
    m = len(fitted.values)
    ratio = float(np.mean(np.square(errors) / stated))
    return math.exp(-m / 2 * math.log1p(2 * ratio / m))


def spread_rows(
    places: Places, start: Sequence[int], count: int, model: Model = "gaussian-process"
) -> list[int]:
    """Return rows that are added to `start` one by one, each where the model knows least.

    The choice depends on the places alone.

    Args:
        places: All N soups.
        start: Rows that are attacked anyway.
        count: Number of rows to add.
        model: The model.
    """
    scales = _Scales(model, LENGTHS[1], HEIGHTS[2], NOISES[1])
    rows = list(start)
    while len(rows) < min(len(start) + count, len(places)):
        attacked = np.asarray(rows, dtype=np.int64)
        variance = _fit_at(places, attacked, np.zeros(len(rows)), scales).variance.copy()
        variance[attacked] = -1
        rows.append(int(np.argmax(np.round(variance, 9))))
    return rows[len(start) :]
