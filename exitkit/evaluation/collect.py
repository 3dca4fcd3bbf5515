"""``collect``: one pass over a data loader, all exits recorded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exitkit.batches import check_labels, checked, move, split_batch
from exitkit.errors import ExitkitError
from exitkit.evaluation.hashes import hash_samples
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.model import MultiExitModel
from exitkit.surgery.calls import call_on
from exitkit.surgery.capture import evaluation_mode


def collect(model: MultiExitModel, loader: Iterable[Any]) -> ExitOutputs:
    """Run every exit on every sample of ``loader``, in eval mode on the model's device.

    Args:
        model: what :func:`exitkit.attach` returned.
        loader: yields ``(inputs, labels)``, dicts with ``labels``, or inputs alone (then labels are None).

    Raises:
        ExitkitError: an empty loader, labels out of range, labels in some batches only, or NaN in the outputs.
    """
    if not isinstance(model, MultiExitModel):
        raise ExitkitError(f"model is {type(model).__name__}; collect takes what exitkit.attach(model) returns")
    device = next(model.parameters()).device
    log_probs: list[Tensor] = []
    labels: list[Tensor] = []
    hashes: list[Tensor] = []
    with evaluation_mode(model), torch.no_grad():
        for batch in checked(loader, "loader"):
            inputs, batch_labels = split_batch(batch)
            hashes.append(hash_samples(inputs))
            logits = torch.stack(call_on(model, move(inputs, device)).logits, dim=1)
            log_probs.append(F.log_softmax(logits.float(), dim=-1).cpu())
            if batch_labels is not None or labels:
                labels.append(check_labels(batch_labels, model.num_classes, len(logits)).cpu())
    macs = torch.tensor([exit_.macs for exit_ in model.exits], dtype=torch.float64)
    return ExitOutputs(
        torch.cat(log_probs),
        torch.cat(labels) if labels else None,
        macs,
        float(model.anatomy.macs),
        model.method.criterion,
        torch.cat(hashes),
        str(logits.dtype).removeprefix("torch."),
    )
