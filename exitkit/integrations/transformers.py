"""``transformers.Trainer`` for a multi-exit model: ``pip install transformers``."""

from __future__ import annotations

from typing import Any, cast

from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.integrations.per_exit import checked_model, exit_metrics, keep_frozen
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.inputs import argument_names
from exitkit.training import fit_ensemble

try:
    from transformers import EvalPrediction, Trainer
except ImportError as error:
    raise ExitkitError(
        "exitkit.integrations.transformers needs transformers: pip install 'exitkit[transformers]'"
    ) from error


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """:func:`exitkit.integrations.per_exit.exit_metrics` of what ``transformers.Trainer`` predicted."""
    return exit_metrics(cast("tuple[Any, ...]", prediction.predictions), prediction.label_ids)


class ExitTrainer(Trainer):
    """``transformers.Trainer`` that minimises the sum of all exits' losses and tells each exit's accuracy.

    A backbone that was frozen (``ee.backbone.requires_grad_(False)``) stays in evaluation mode. After training the method's
    ensemble is fitted, on the evaluation set where there is one. Columns that the backbone does not take are removed.

    Args:
        model: what :func:`exitkit.attach` returned.
        args: as for ``transformers.Trainer``, as are all others by name.

    Raises:
        ArgumentError: a model without exits, or label smoothing.
    """

    def __init__(self, model: MultiExitModel, args: Any = None, **kwargs: Any) -> None:
        if args is not None and args.label_smoothing_factor:
            raise ArgumentError(
                f"label_smoothing_factor={args.label_smoothing_factor} is for models of one output; leave it at 0, or use "
                "exitkit.Trainer(ee, loss=exitkit.training.Loss(label_smoothing=...))"
            )
        super().__init__(checked_model(model), args, **{"compute_metrics": compute_metrics, **kwargs})
        self.exits = model
        self._signature_columns: Any = [
            *argument_names(model.backbone.forward),
            *self.label_names,
            "label",
            "label_ids",
        ]

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        keep_frozen(self.exits)
        return super().compute_loss(model, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        self.exits.eval()
        fit_ensemble(
            self.exits, self.get_train_dataloader() if self.eval_dataset is None else self.get_eval_dataloader()
        )
        return output
