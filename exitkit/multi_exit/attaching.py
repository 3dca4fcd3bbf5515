"""``attach`` and ``detach``: from a model to a multi-exit model, and back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from torch import nn

from exitkit.common.checks import Bounds, check
from exitkit.common.errors import ArgumentError
from exitkit.exits.classifiers import Head
from exitkit.methods.presets import Method
from exitkit.multi_exit.assembly import Parts, assemble
from exitkit.multi_exit.model import MultiExitModel


def attach(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    every: int | None = None,
    at: Sequence[str | int] | None = None,
    at_cost: Sequence[float] | None = None,
    placement: str | None = None,
    first: int | None = None,
    method: str | Method = "ztw",
    head: Head | Sequence[Head] = "auto",
    num_classes: int | None = None,
    num_outputs: int | None = None,
) -> MultiExitModel:
    """Attach early exits to a pretrained classifier. The model, its weights and its flags stay as they are.

    What is added is in evaluation mode; :class:`exitkit.Trainer` takes care of modes, a loop of your own calls ``ee.train()``.

    All but one thing: where ``num_classes`` differs from what the model gives, its last linear layer is replaced in place by
    a freshly initialised one (transfer learning), which belongs to the exits: it is saved with them.

    Args:
        model: any classifier whose output is logits (B, C): torchvision, timm, Hugging Face or your own.
        example_inputs: a tensor, a tuple of tensors or a dict of tensors, batch first. Inferred for torchvision, timm
            and Hugging Face models.
        every: an exit after blocks n, 2n, …, never after the last one; 1 for every block. Without this argument and the next
            three there are three exits (or fewer, where there are fewer blocks): after the blocks nearest to 15, 45 and 75%
            of the backbone's MACs. Each exit takes time from every sample that comes by, on one sample as much as a block.
        at: boundaries by name, or blocks by number, as ``exitkit.inspect(model)`` lists them; each once.
        at_cost: shares of the backbone's MACs, such as ``[.15, .3, .45]``; the nearest block is taken.
        placement: ``"dense-sparse"`` or ``"sparse-dense"`` (Kubaty et al.), or ``"sdn"``: the blocks nearest to 15, 30, 45,
            60, 75 and 90% of the backbone's MACs (Kaya et al.).
        first: the block that ``every`` begins with, by number; n − 1 by default. ``every=n, first=1`` is "every n" of Kubaty
            et al., who never read block 0.
        method: ``"sdn"``, ``"pbee"``, ``"ztw"``, ``"gpf"``, ``"branchynet"``, or a config such as
            ``exitkit.ZTW(ensemble="additive")``.
        head: ``"auto"`` (``"2L-256"`` on maps, else ``"1L"``), ``"1L"`` (pooling and a linear layer), ``"2L-<width>"`` (one
            hidden layer), ``"conv"`` (Zero Time Waste's, for maps), ``"separable"`` or ``"strided"`` (cheaper convolutions),
            ``"msdnet"`` (MSDNet's own exits),
            ``"tail"``: a copy of what the backbone does after its last block, with its weights, for features of the same
            shape, and for maps of another one behind a learned 1 × 1 adapter; or ``"branch-<n>"``: a copy of the rest of the
            backbone, shortened to at most n blocks of each shape, those before the exit counted. Copies have no dropout.
            Or a function from an ``exitkit.exits.Feature`` to a module that makes a vector (B, D) of it, such as
            ``functools.partial(exitkit.exits.conv, stride=4)``, and as text ``"conv(stride=4)"`` or ``"module:function"``; it
            reads the feature alone, without a mask. A list gives each exit its own.
        num_classes: how many classes the backbone and the exits shall tell apart; by default as many as it does.
        num_outputs: 1 for regression, which a model with one output (B, 1) is anyway.

    Raises:
        ExitkitError: an argument is wrong, the model cannot be captured, or the cut model would not equal it. The model is
            then as it was.
    """
    if isinstance(model, MultiExitModel):
        raise ArgumentError("model already has exits; attach to exitkit.detach(model) for other ones")
    where = {"every": every, "at": at, "at_cost": at_cost, "placement": placement, "first": first}
    parts = assemble(model, example_inputs, where, method, head, _outputs(num_classes, num_outputs))
    if parts.probabilities:
        warn_of_probabilities(model)
    return with_exits(parts)


def warn_of_probabilities(model: nn.Module) -> None:
    """Tell the caller of the function that calls this one that the forward of a model it gave ends in a softmax."""
    warnings.warn(
        f"{type(model).__name__} returns probabilities: its forward ends in a softmax. exitkit takes them for logits, in "
        "losses, ensembles and scores; leave the softmax out, or wrap the model in a module that returns their log()",
        stacklevel=3,
    )


def with_exits(parts: Parts) -> MultiExitModel:
    """A model of new parts, whose exits are in evaluation mode."""
    ee = MultiExitModel(parts)
    ee.training = False  # of the model alone: the backbone keeps its mode
    for added in (ee.classifiers, ee.combiners):
        added.eval()
    return ee


def detach(model: MultiExitModel) -> nn.Module:
    """The user's own model, as it was before :func:`exitkit.attach`, but for a last layer that ``attach`` replaced."""
    if not isinstance(model, MultiExitModel):
        raise ArgumentError(f"detach takes what exitkit.attach returned, not {type(model).__name__}")
    return model.backbone


def _outputs(num_classes: int | None, num_outputs: int | None) -> int | None:
    """How many outputs are asked for; None for as many as the model has."""
    check("num_classes", num_classes, Annotated[int, Bounds(least=2)] | None, "num_outputs=1 is for regression")
    check("num_outputs", num_outputs, Literal[1] | None, "1 is for regression, classes are given as num_classes")
    if num_classes is not None and num_outputs is not None:
        raise ArgumentError(f"{num_classes=} and {num_outputs=} were given together; give one")
    return num_classes if num_outputs is None else num_outputs
