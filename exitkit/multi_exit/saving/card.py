"""The model card of saved exits: what they are, what they cost, and how good they are where that was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from exitkit.common.errors import ArgumentError
from exitkit.common.intervals import with_interval
from exitkit.methods.policy import ExitPolicy, typed
from exitkit.multi_exit.saving.hub import is_name

if TYPE_CHECKING:
    from exitkit.evaluation.outputs import ExitOutputs
    from exitkit.multi_exit.model import MultiExitModel
    from exitkit.multi_exit.saving.configuration import Configuration


def identity(backbone: nn.Module) -> dict[str, str | None]:
    """A backbone's class, its name on the Hub (Hugging Face models) and its architecture's name (timm models)."""
    kind = type(backbone)
    cfg, name = getattr(backbone, "pretrained_cfg", None), getattr(backbone, "name_or_path", None)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "hub_name": name if isinstance(name, str) and is_name(name) and not Path(name).exists() else None,
        "architecture": cfg.get("architecture") if isinstance(cfg, Mapping) else None,
    }


def measured(model: MultiExitModel, outputs: ExitOutputs, policy: ExitPolicy | None) -> dict[str, Any]:
    """What ``outputs`` say of the exits, for JSON: accuracy per exit, the budget table, and what the threshold gives.

    Raises:
        ExitkitError: outputs without labels, or of another model.
    """
    if not hasattr(outputs, "log_probs"):
        raise ArgumentError(f"outputs is {type(outputs).__name__}; give what exitkit.collect(ee, loader) returned")
    costs, classes = [exit_.macs for exit_ in model.exits], outputs.log_probs.shape[2]
    if outputs.macs.tolist() != costs or classes != model.num_classes:
        raise ArgumentError(
            f"outputs are of another model: {classes} classes and exits at {outputs.macs.tolist()} MACs, where this one has "
            f"{model.num_classes} and {costs}; give what exitkit.collect(ee, loader) returned for it"
        )
    if policy is not None:
        outputs = outputs.under(policy)  # all thresholds on the card are for the same scores
    curve = outputs.curve(model.method.criterion if policy is None else policy.criterion)
    rows = curve.budget_table().rows
    return {
        "measure": outputs.measure,
        "temperatures": outputs.temperatures,
        "samples": len(outputs.log_probs),
        "accuracy": outputs.accuracy().tolist(),
        "budgets": {name: None if point is None else point.to_dict() for name, point in rows.items()},
        "at_threshold": None if policy is None else outputs.at(policy).to_dict(),
    }


def card_of(model: MultiExitModel, config: Configuration, source: str) -> str:
    """The card of exits with this configuration, which ``from_pretrained`` finds at ``source``."""
    from huggingface_hub import ModelCardData

    backbone, metrics, policy = config.backbone, config.metrics, config.policy
    data = ModelCardData(
        library_name="exitkit",
        tags=["early-exit"],
        base_model=backbone["hub_name"],
        metrics=[metrics["measure"].split()[0].lower()] if metrics else None,
    )
    kind = str(backbone["class"]).rpartition(".")[2]
    threshold = "" if policy is None else f"\nee.threshold  # τ = {policy.shown()}, chosen for these exits"
    return f"""---
{data.to_yaml()}
---

# Early exits for {backbone["hub_name"] or backbone["architecture"] or kind}

Exits for a `{backbone["class"]}`: method `{model.method.name}`, heads `{model.head}`, criterion `{model.method.criterion}`;
made with exitkit {config.versions["exitkit"]}. Only the exits are here{_new_head(model)}; the backbone is not.

```python
import exitkit

backbone = ...  # the {kind} that the exits were trained on, with its weights
ee = exitkit.MultiExitModel.from_pretrained(backbone, "{source}"){threshold}
```

Costs are multiply-accumulates per sample, as a share of the backbone's {model.anatomy.macs:,}.

{policy.guarantee if policy and policy.guarantee else ""}

{_exits(model, metrics)}
{_budgets(metrics) if metrics else ""}"""


def _shown(numbers: Any) -> str:
    """One or several numbers in a few digits."""
    return ", ".join(f"{number:.6g}" for number in (numbers if isinstance(numbers, list | tuple) else [numbers]))


def _taus(thresholds: float | Sequence[float]) -> str:
    """One or several thresholds, as they can be typed."""
    return ", ".join(map(typed, thresholds if isinstance(thresholds, Sequence) else [thresholds]))


def _new_head(model: MultiExitModel) -> str:
    return (
        f", and the backbone's last layer, which was replaced by one with {model.num_classes} outputs"
        if model.new_head
        else ""
    )


def _exits(model: MultiExitModel, metrics: Mapping[str, Any] | None) -> str:
    rows = [[str(m), f"`{exit_.name}`", f"{exit_.macs_fraction:.1%}"] for m, exit_ in enumerate(model.exits)]
    if metrics is None:
        return _table(["exit", "reads", "cost to answer here"], rows)
    accurate = [[*row, f"{accuracy:.2%}"] for row, accuracy in zip(rows, metrics["accuracy"], strict=True)]
    return _table(["exit", "reads", "cost to answer here", f"{metrics['measure']} on all samples"], accurate)


def _budgets(metrics: Mapping[str, Any]) -> str:
    chosen = {"τ as chosen": metrics["at_threshold"]} if metrics["at_threshold"] else {}
    rows = [
        [name, f"{point['accuracy']:.2%}", f"{point['cost']:.1%}", _taus(point["threshold"])]
        if point
        else [name, "-", "-", "-"]
        for name, point in {**chosen, **metrics["budgets"]}.items()
    ]
    sure = ""
    if metrics["measure"] == "accuracy":
        sure = f"The backbone's accuracy: {with_interval(metrics['accuracy'][-1], metrics['samples'])}.\n\n"
    return f"""
{sure}On {metrics["samples"]:,} samples, each of which leaves at the first exit whose score is above τ{_divided(metrics)}:

{_table(["budget", metrics["measure"], "average cost", "τ"], rows)}
"""


def _divided(metrics: Mapping[str, Any]) -> str:
    """What the scores are of, where exits have temperatures."""
    return f" (logits divided by {_shown(metrics['temperatures'])} for the score)" if metrics["temperatures"] else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
