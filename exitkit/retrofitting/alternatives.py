"""What else could be shipped: a smaller network alone, and a smaller network before the backbone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit.calibration.risk_control import choose_threshold
from exitkit.calibration.risks import Risk, RiskName
from exitkit.common.batches import checked, move, split_batch
from exitkit.common.errors import ArgumentError
from exitkit.common.hashes import hash_samples
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.surgery.capturing import Capture, capture, evaluation_mode, logits_of
from exitkit.surgery.inputs import call_on
from exitkit.surgery.macs import profile
from exitkit.surgery.replace_classifier import outputs_of


@dataclass(frozen=True)
class Alternative:
    """Something else to ship, measured on the calibration samples.

    Attributes:
        name: what it is.
        cost: average MACs, as a share of the backbone's.
        risk: what it loses against the backbone, as the promise counts.
        accuracy: None without labels.
        promised: whether the promise that was asked for can be given for it too.
        milliseconds: per sample, compiled; of two networks, of the first and of the backbone for those it is not sure of.
    """

    name: str
    cost: float
    risk: float
    accuracy: float | None
    promised: bool
    milliseconds: float


def named(alternatives: Sequence[nn.Module] | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Alternatives by name; that of their class, with a number where several have it.

    Raises:
        ArgumentError: what is no module.
    """
    if isinstance(alternatives, Mapping):
        given = dict(alternatives)
    else:
        given = {}
        for model in alternatives:
            name = type(model).__name__
            given[name if name not in given else f"{name} {len(given) + 1}"] = model
    for name, model in given.items():
        if not isinstance(model, nn.Module):
            raise ArgumentError(
                f"alternatives holds {name!r}, which is {type(model).__name__}; give torch modules with the same classes as "
                "the model, or a dict of them by name"
            )
    return given


def captured_alternatives(models: Mapping[str, nn.Module], example: Any, classes: int) -> dict[str, Capture]:
    """Each captured with the model's own inputs.

    Raises:
        ArgumentError: other classes than the model's.
    """
    found = {}
    for name, model in models.items():
        found[name] = capture(model, example)
        own = outputs_of(found[name])
        if own != classes:
            raise ArgumentError(
                f"alternatives: {name!r} has {own} classes and the model {classes}; give classifiers of the same classes, in "
                "the same order"
            )
    return found


def macs_of(captured: Capture) -> int:
    """MACs of a whole network for one sample."""
    return profile(captured.graph, captured.example).total


def beside(captured: Capture, calibration: Iterable[Any], backbone: ExitOutputs) -> ExitOutputs:
    """A network's answers to the samples of ``backbone`` as those of an exit before it; ``calibration`` may shuffle them."""
    first, hashes = _answers(captured.backbone, calibration)
    known, order = hashes.sort()
    assert backbone.hashes is not None
    rows = order[torch.searchsorted(known, backbone.hashes)]
    last: Tensor = torch.cat([part[:, -1] for part in backbone.chunks()])
    macs = torch.tensor([macs_of(captured), backbone.backbone_macs], dtype=torch.float64).cumsum(0)
    log_probs = torch.stack([F.log_softmax(first[rows], -1), last], 1)
    return ExitOutputs(log_probs, backbone.labels, macs, backbone.backbone_macs, hashes=backbone.hashes)


def _answers(model: nn.Module, calibration: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Logits of the calibration samples (N, C), and their content hashes, in the order of one pass."""
    logits, hashes = [], []
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.inference_mode():
        for batch in checked(calibration, "calibration_loader"):
            inputs, _ = split_batch(batch)
            logits.append(logits_of(call_on(model, move(inputs, device))).float().cpu())
            hashes.append(hash_samples(inputs))
    return torch.cat(logits), torch.cat(hashes)


def weighed(
    name: str,
    outputs: ExitOutputs,
    risk: Risk,
    max_drop: float,
    confidence: float,
    milliseconds: tuple[float, float],
) -> tuple[Alternative, Alternative]:
    """The network alone, and before the backbone at the threshold that keeps the promise.

    Alone it is the end of the thresholds that are tested in order, where every sample leaves: one test serves both.
    ``outputs`` are those of :func:`beside`; ``milliseconds`` per sample, of this network and of the backbone.
    """
    labelled = outputs.labels is not None
    judged = outputs if labelled else outputs.against_backbone()
    losses, _ = risk.losses(judged)
    policy = choose_threshold(judged, max_drop, confidence, _name(risk))
    point, stays = judged.at(policy), float(outputs.exit_rates(policy)[-1])
    assert policy.guarantee is not None
    alone = Alternative(
        name,
        float(outputs.costs[0]),
        risk.unscaled(float(losses[:, 0].mean())),
        float(judged.accuracy()[0]) if labelled else None,
        stays == 0,
        milliseconds[0],
    )
    both = Alternative(
        f"{name}, then the model",
        point.cost,
        policy.guarantee.measured,
        point.accuracy if labelled else None,
        policy.guarantee.found,
        milliseconds[0] + stays * milliseconds[1],
    )
    return alone, both


def _name(risk: Risk) -> RiskName:
    return risk.name  # type: ignore[return-value]  # risks of retrofit are named ones
