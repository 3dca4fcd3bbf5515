"""``RegressionOutputs``: what every exit of a model with one output predicted about every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from exitkit.common.errors import ArgumentError, unknown_name
from exitkit.evaluation.curve import Curve
from exitkit.evaluation.files import REGRESSION
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.methods.criteria import Criterion

Measure = Literal["pearson", "r2", "mse"]


@dataclass(frozen=True, eq=False, repr=False)
class RegressionOutputs(ExitOutputs):
    """Predictions of M exits and the backbone (exit M) on N samples; ``accuracy`` is Pearson's correlation with the labels.

    Attributes:
        log_probs: the predictions, float32, given as (N, M+1) and held as (N, M+1, 1).
        labels: (N,) float32, or None when there are none.
        criterion: ``"tolerance"``, see :class:`exitkit.methods.criteria.Tolerance`; a sample leaves above τ = −a, once as many
            changes in a row as it says (``"tolerance-2"``) were smaller than a.

    Raises:
        ArgumentError: shapes that do not fit together, numbers that are not finite, or costs that fall.
    """

    criterion: str = "tolerance"

    measure: ClassVar[str] = "Pearson correlation"
    _format: ClassVar[str] = REGRESSION

    @property
    def predictions(self) -> Tensor:
        """(N, M+1)."""
        return self.log_probs[:, :, 0]

    @property
    def correct(self) -> Tensor:
        """Regression has no right and wrong."""
        raise ArgumentError(
            "regression has no right and wrong predictions, and so no guarantee; use mse(), accuracy() (Pearson), or curve(), "
            "whose at_budget(0.5) has a threshold"
        )

    def correct_among(self, top: int) -> NoReturn:
        """Regression has no classes."""
        raise ArgumentError(
            f"top={top!r} counts classes, and a regression has none; use mse() or accuracy() (Pearson)"
        )

    def accuracy(self, top: int = 1) -> NDArray[np.float64]:
        """(M+1,): Pearson's correlation of each exit's predictions with the labels; 0 where they are all the same."""
        self._no_classes(top)
        return _correlation(self._moments().sum(0), self._targets())

    def spearman(self) -> NDArray[np.float64]:
        """(M+1,): Spearman's rank correlation of each exit's predictions with the labels; 0 where they are all the same."""
        from scipy.stats import spearmanr

        targets = self._targets()
        columns = self.predictions.double().numpy().T
        return np.array([spearmanr(column, targets).statistic if np.ptp(column) else 0.0 for column in columns])

    def squared_errors(self) -> NDArray[np.float64]:
        """(N, M+1): of each sample at each exit."""
        if self.labels is None:
            raise ArgumentError("labels=None: how good predictions are needs labels")
        errors: NDArray[np.float64] = (self.predictions.double() - self.labels[:, None]).square().numpy()
        return errors

    def mse(self) -> NDArray[np.float64]:
        """(M+1,): mean squared error of each exit."""
        errors: NDArray[np.float64] = self.squared_errors().mean(0)
        return errors

    def curve(
        self,
        criterion: str | Criterion | None = None,
        measure: Measure = "pearson",
        *,
        top: int = 1,
        milliseconds: Sequence[float] | None = None,
    ) -> Curve:
        """The measure and the average cost at every distinct threshold.

        Args:
            criterion: ``"tolerance"``.
            measure: ``"pearson"``; ``"r2"``, the share of the labels' variance that is explained: 1 − MSE / variance; or
                ``"mse"``, the mean squared error, of which less is better (Kubaty et al., table 2).
            top: 1; a regression has no classes.
            milliseconds: as for :meth:`ExitOutputs.curve`.
        """
        self._no_classes(top)
        if measure not in get_args(Measure):
            raise unknown_name("measure", measure, get_args(Measure))
        targets = self._targets()
        values = self._moments() if measure == "pearson" else self.squared_errors()

        def measured(sums: NDArray[np.float64]) -> NDArray[np.float64]:
            if measure == "pearson":
                return _correlation(sums, targets)
            return sums / len(self) if measure == "mse" else 1 - sums / ((targets - targets.mean()) ** 2).sum()

        no_exit = self.policy(float("inf"), criterion)
        return replace(self._traced(no_exit, values, measured, milliseconds), measure=measure)

    def calibrated(self, temperatures: Sequence[float], fitted_on: ExitOutputs | Tensor | None = None) -> NoReturn:
        """Predictions have no temperature.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(
            "regression has no temperatures: its score is the change between predictions, which needs no calibration"
        )

    def _targets(self) -> NDArray[np.float64]:
        """The labels, which must differ for anything to be correlated with or explained."""
        if self.labels is None:
            raise ArgumentError("labels=None: how good predictions are needs labels")
        if bool((self.labels == self.labels[0]).all()):
            raise ArgumentError(
                "labels are all the same, so that nothing correlates with them; use mse(), or more samples"
            )
        return self.labels.double().numpy()

    def _no_classes(self, top: int) -> None:
        if top != 1:
            self.correct_among(top)

    def _reached(self, exits: NDArray[np.int64], top: int) -> float:
        """Pearson's correlation where each sample is answered by its exit."""
        self._no_classes(top)
        moments = self._moments()[np.arange(len(self)), exits]
        return float(_correlation(moments.sum(0), self._targets()))

    def _moments(self) -> NDArray[np.float64]:
        """(N, M+1, 3): prediction, its square, and its product with the label, both centred for precision."""
        targets = self._targets()
        predictions = self.predictions.double().numpy() - targets.mean()
        products = predictions * (targets - targets.mean())[:, None]
        return np.stack([predictions, predictions**2, products], axis=-1)

    @staticmethod
    def _checked(given: Tensor) -> Tensor:
        """Finite float32 predictions (N, M+1, 1)."""
        predictions = given[..., None] if given.dim() == 2 else given
        if predictions.dim() != 3 or predictions.shape[2] != 1 or 0 in given.shape or not given.is_floating_point():
            raise ArgumentError(
                f"predictions have dtype {given.dtype} and shape {tuple(given.shape)}; expected floating point of shape "
                "(samples, exits + 1)"
            )
        if not bool(given.isfinite().all()):
            exit_ = int((~predictions.isfinite()).any(0).int().argmax())
            raise ArgumentError(
                f"predictions hold NaN or infinity: exit {exit_} on {int((~predictions[:, exit_].isfinite()).sum())} of "
                f"{len(given)} samples; check the model's inputs (normalised?) and run in float32"
            )
        return predictions.float().contiguous()


def _correlation(sums: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's correlation from sums (…, 3) of moments over the samples; labels are centred, so theirs is 0."""
    count, spread = len(targets), ((targets - targets.mean()) ** 2).sum()
    first, second, product = np.moveaxis(sums, -1, 0)
    variance = np.clip(second - first**2 / count, 0, None) * spread
    correlation: NDArray[np.float64] = np.divide(
        product, np.sqrt(variance), out=np.zeros_like(product), where=variance > 1e-12 * (second * spread)
    )
    return correlation
