"""A multi-exit model as a Lightning module: ``pip install lightning``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from exitkit.common.batches import split_batch
from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.integrations.per_exit import checked_model, exit_metrics, keep_frozen
from exitkit.multi_exit.calling import call_model
from exitkit.multi_exit.model import MultiExitModel
from exitkit.multi_exit.output import MultiExitOutput
from exitkit.training import fit_ensemble

try:
    from lightning import LightningModule
except ImportError as error:
    raise ExitkitError("exitkit.integrations.lightning needs Lightning: pip install lightning") from error


class ExitModule(LightningModule):
    """Minimises the sum of all exits' losses, and logs ``train_loss``, ``val_loss`` and each exit's ``val_accuracy``.

    A backbone that was frozen (``ee.backbone.requires_grad_(False)``) stays in evaluation mode. After training the method's
    ensemble is fitted, on the validation set where there is one.

    Args:
        model: what :func:`exitkit.attach` returned; trained in place.
        lr: the optimiser's.
        optimizer: makes the optimiser from the parameters that learn and ``lr``.

    Raises:
        ArgumentError: a model without exits.
    """

    def __init__(
        self,
        model: MultiExitModel,
        lr: float = 1e-3,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    ) -> None:
        super().__init__()
        self.model, self.lr, self.optimizer = checked_model(model), lr, optimizer

    def on_train_epoch_start(self) -> None:
        """Put what learns into training mode: Lightning leaves modes as they are, and heads are made in evaluation mode."""
        self.model.train()
        keep_frozen(self.model)

    def training_step(self, batch: Any, *_: Any) -> Tensor:
        loss: Tensor = self._outputs(batch)[0]["loss"]
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, *_: Any) -> None:
        output, labels = self._outputs(batch)
        metrics = {"loss": output["loss"], **exit_metrics(output.logits, labels)}
        self.log_dict({f"val_{name}": value for name, value in metrics.items()}, batch_size=len(output.logits[-1]))

    def on_train_end(self) -> None:
        """Fit the method's ensemble, on the validation set where there is one, and leave the model in evaluation mode."""
        self.model.eval()
        held_out: Any = self.trainer.val_dataloaders or self.trainer.train_dataloader
        fit_ensemble(self.model, chain(*held_out) if isinstance(held_out, list) else held_out)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad], lr=self.lr)

    def _outputs(self, batch: Any) -> tuple[MultiExitOutput, Any]:
        """The model's answers to a batch of the loader, with their loss, and its labels."""
        inputs, labels = split_batch(batch)
        if labels is None:
            raise ArgumentError("the loader yields no labels; yield (inputs, labels) or a dict with the key 'labels'")
        return call_model(self.model, partial(self.model, labels=labels), inputs), labels
