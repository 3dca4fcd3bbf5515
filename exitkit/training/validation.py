"""One pass over the validation set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exitkit.common.batches import check_labels, checked, split_batch
from exitkit.common.errors import DivergedError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.capturing import evaluation_mode
from exitkit.surgery.mistakes import not_finite
from exitkit.training.feature_cache.heads_alone import HeadsAlone, call_view
from exitkit.training.step import placed

if TYPE_CHECKING:
    from accelerate import Accelerator


def validate(
    model: MultiExitModel,
    view: MultiExitModel | HeadsAlone,
    loader: Iterable[Any],
    accelerator: Accelerator,
    channels_last: bool,
    after_batch: Callable[[], None],
) -> tuple[tuple[float, ...] | None, tuple[float, ...]]:
    """Accuracy (None for regression) and mean loss of every head, the backbone's last, over all processes.

    ``view`` is what the loader's batches are for: the model, or its heads alone. ``after_batch`` is called after each.

    Raises:
        ArgumentError: an empty loader, or labels that are not class indices.
        DivergedError: answers that are not finite, where inputs are not.
    """
    right, losses, samples = torch.zeros(len(model.exits)), torch.zeros(len(model.exits)), 0
    with evaluation_mode(model), torch.no_grad(), accelerator.autocast():
        for batch in checked(loader, "val_loader"):
            inputs, labels = split_batch(batch)
            _, heads = call_view(model, view, view.run_heads, placed(inputs, accelerator.device, channels_last))
            answers = torch.stack([logits.float() for logits in heads], 1)
            broken = not isinstance(view, HeadsAlone) and bool(answers.isnan().any())
            if broken and (mistake := not_finite(inputs)) is not None:
                raise DivergedError(f"the loss on val_loader is not finite: {mistake}")
            targets = check_labels(labels, model.num_classes, len(answers)).to(answers.device)
            answers, targets = (part.cpu() for part in accelerator.gather_for_metrics((answers, targets)))
            samples += len(answers)
            losses += _sample_losses(answers, targets).sum(0)
            right += (answers.argmax(-1) == targets[:, None]).sum(0)
            after_batch()
    accuracy = None if model.num_classes == 1 else tuple((right / samples).tolist())
    return accuracy, tuple((losses / samples).tolist())


def _sample_losses(answers: Tensor, targets: Tensor) -> Tensor:
    """Each exit's loss on each sample (N, M + 1) of answers (N, M + 1, C)."""
    if answers.shape[-1] == 1:
        return (answers[..., 0] - targets[:, None]).square()
    expanded = targets[:, None].expand(answers.shape[:2])
    return F.cross_entropy(answers.flatten(0, 1), expanded.flatten(), reduction="none").view(answers.shape[:2])
