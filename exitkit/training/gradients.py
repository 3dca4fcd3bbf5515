"""The gradients of all exits on the same weights, by their inner products alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from exitkit.common.batches import check_training_labels, split_batch
from exitkit.multi_exit.loss import classification
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.capturing import logits_of
from exitkit.surgery.inputs import call_on
from exitkit.training.freezing import Stages
from exitkit.training.left_alone import buffers_restored
from exitkit.training.objective import Objective
from exitkit.training.step import batch_norm_explained, placed

GROUP_BYTES = 256 * 2**20
"""The gradients, of all exits, that are kept at once; one parameter alone may need more."""

ANALYSED = 4
"""Batches that are measured after an epoch (``Trainer(analyse=)``)."""

_CHUNK = 2**20
"""Entries of a gradient that are multiplied at once in float64."""


def loss_rows(model: MultiExitModel, objective: Objective, batch: object, weights: Sequence[float]) -> Tensor:
    """(M+2,): every exit's own loss on a batch, and what the objective holds beside their weighted sum.

    An exit's own loss is the cross-entropy or squared error. Distillation and imitation losses are in the last entry, which
    is without gradient where there are none. Mode and gradient setting are the caller's.

    Raises:
        ArgumentError: no labels and no teacher, or labels out of range.
    """
    inputs, labels = split_batch(batch)
    inputs = placed(inputs, next(model.parameters()).device, channels_last=False)
    with batch_norm_explained():
        output = call_on(model, inputs)
    heads = [logits.float() for logits in output.heads]
    targets = None if labels is None else check_training_labels(labels, model.num_classes, len(heads[-1]))
    targets = None if targets is None else targets.to(heads[-1].device)
    exits = range(len(heads))
    losses = objective.losses(heads, targets, exits, _teacher(objective, inputs))
    own = torch.stack([classification(logits, targets, objective.loss.label_smoothing) for logits in heads])
    if objective.loss.distillation is None and output.auxiliary is None:
        return torch.cat([own, own.new_zeros(1)])
    if output.auxiliary is not None:
        losses = losses + torch.stack([*output.auxiliary, losses[0] * 0])
    rest = objective.total(losses, weights, exits) - objective.total(own, weights, exits)
    return torch.cat([own, rest.reshape(1)])


def _teacher(objective: Objective, inputs: object) -> Tensor | None:
    distillation = objective.loss.distillation
    if distillation is None or not isinstance(distillation.teachers, nn.Module):
        return None
    with torch.no_grad():
        return logits_of(call_on(distillation.teachers, inputs))


def inner_products(rows: Tensor, blocks: Sequence[Sequence[nn.Parameter]]) -> Tensor:
    """(blocks, R, R) float64: the inner products of the gradients of R losses, block of parameters by block.

    As many backward passes as there are losses where all gradients fit into :data:`GROUP_BYTES`; otherwise again for every
    group of parameters that does, so that memory never holds R times all parameters.
    """
    grams = torch.zeros(len(blocks), len(rows), len(rows), dtype=torch.float64)
    for group in _groups(blocks, len(rows)):
        parameters = [parameter for _, parameter in group]
        gradients = [_gradient(row, parameters) for row in rows]
        for place, (block, _) in enumerate(group):
            for chunk in zip(*(one[place].reshape(-1).split(_CHUNK) for one in gradients), strict=True):
                stacked = torch.stack(chunk).double()
                grams[block] += (stacked @ stacked.T).cpu()
    return grams


def _gradient(row: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    if not row.requires_grad:
        return tuple(torch.zeros_like(parameter) for parameter in parameters)
    return torch.autograd.grad(row, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


def _groups(blocks: Sequence[Sequence[nn.Parameter]], rows: int) -> Iterator[list[tuple[int, nn.Parameter]]]:
    """Parameters with the numbers of their blocks, as many at once as memory is meant for."""
    group: list[tuple[int, nn.Parameter]] = []
    size = 0
    for block, parameters in enumerate(blocks):
        for parameter in parameters:
            needed = rows * parameter.numel() * parameter.element_size()
            if group and size + needed > GROUP_BYTES:
                yield group
                group, size = [], 0
            group.append((block, parameter))
            size += needed
    if group:
        yield group


def objective_weights(objective: Objective, weights: Sequence[float]) -> tuple[float, ...]:
    """What each exit's loss is multiplied by in the objective: (M+1,)."""
    scale = len(weights) if objective.loss.reduction == "mean" else 1
    return tuple(weight / scale for weight in weights)


def dominance_of(gram: Tensor, weights: Tensor, stages: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine with the objective's gradient, share of its squared length, and the ceiling that depth sets.

    With M = G Gᵀ and g = Σ_j α_j g_j: cos(g_i, g) = (Mα)_i / √(M_ii αᵀMα), share_i = α_i (Mα)_i / αᵀMα, and the ceiling is
    the length of the part of g that exit i's own parameters hold, over ‖g‖: random gradients rise with it as well.

    Args:
        gram: (blocks, R, R), of the gradients of R losses. The first ``stages`` blocks are the backbone's; block b is reached
            by the exits from b on. A block behind them holds heads, each of which its own exit reaches, and where heads are
            linked others.
        weights: (R,) α.

    Returns:
        Three tensors (R,); NaN where a gradient is zero.
    """
    whole = gram.sum(0)
    along = whole @ weights
    square = weights @ along
    lengths = torch.einsum("i,bij,j->b", weights, gram[:stages], weights).clamp(min=0)
    reached = lengths.cumsum(0)[torch.arange(len(weights)).clamp(max=stages - 1)]
    heads = gram[stages:].sum(0)
    meeting = weights * (heads != 0)  # losses that meet no gradient of exit i's reach none of its heads
    reached += torch.einsum("ij,jk,ik->i", meeting, heads, meeting)
    return along / (whole.diagonal() * square).sqrt(), weights * along / square, (reached / square).clamp(max=1).sqrt()


def shared_by(exits: Sequence[int], stages: Stages) -> list[tuple[nn.Parameter, ...]]:
    """The backbone's learning parameters that two or more of ``exits`` reach, stage by stage.

    What lies behind all exits but the last, such as the backbone's classifier, is that exit's own: a head.
    """
    return list(stages.parameters[: sorted(exits)[-2] + 1]) if len(exits) > 1 else []


def heads_of(model: MultiExitModel, stages: Stages) -> tuple[nn.Parameter, ...]:
    """The learning parameters of all heads, the backbone's own behind the last internal exit among them."""
    internal = (parameter for parameter in model.classifiers.parameters() if parameter.requires_grad)
    return (*internal, *stages.parameters[-1])


def gram_on(
    model: MultiExitModel,
    objective: Objective,
    batch: object,
    weights: Sequence[float],
    blocks: Sequence[Sequence[nn.Parameter]],
) -> Tensor:
    """:func:`inner_products` of :func:`loss_rows` on one batch, as the step sees them; statistics are as before afterwards.

    Under gradient equilibrium the gradient of stage b, of all M + 1, is divided by the M + 1 − b exits behind it.
    """
    with torch.enable_grad(), buffers_restored(model):
        gram = inner_products(loss_rows(model, objective, batch, weights), blocks)
    if objective.loss.gradient_equilibrium:
        exits = len(weights)
        behind = torch.tensor([exits - stage if stage < exits else 1 for stage in range(len(blocks))])
        gram /= behind.square()[:, None, None]
    return gram
