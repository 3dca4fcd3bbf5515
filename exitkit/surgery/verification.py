"""The check that the two views of a model agree: stages joined again against the user's own modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from exitkit.common.errors import NotCapturableError
from exitkit.surgery.boundaries import Boundary
from exitkit.surgery.capturing import Capture, logits_of, untouched
from exitkit.surgery.hooks import HookPoint, on_calls, tensor_leaves
from exitkit.surgery.inputs import Example
from exitkit.surgery.partition import Partition

_OTHER_BATCH = 3
_FEWER_TOKENS = 3
# Kernels may be chosen by batch size or be non-deterministic anywhere but on CPU in float32.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_MIXED = (1e-3, 0.25)
"""Share of the largest logit by which a sample's may differ in another batch: where the comparison is exact, and elsewhere."""


def verify(captured: Capture, boundaries: Sequence[Boundary], partition: Partition) -> tuple[HookPoint, ...]:
    """Run both views at two batch sizes (for text, also at two lengths) and return where each feature is read.

    Raises:
        ExitkitError: a feature or the logits differ; the message names the module.
    """
    other = captured.example.with_batch(_OTHER_BATCH)
    shorter = (
        captured.example.text and _takes_other_lengths(captured) and other.tensors[0].shape[1] > _FEWER_TOKENS + 2
    )
    if shorter:
        other = other.shorter(_FEWER_TOKENS)
    with untouched(captured.backbone), torch.no_grad(), exact_attention():
        points, logits = _compare(captured, boundaries, partition, captured.example)
        other_points, other_logits = _compare(captured, boundaries, partition, other)
    if other_points != points:
        raise NotCapturableError(
            f"{type(captured.backbone).__name__} returns its features in another order at another batch size; "
            "exits cannot be attached to it"
        )
    if not shorter:
        _check_apart(captured.backbone, logits, other_logits)
    return points


def _check_apart(model: nn.Module, logits: Tensor, in_other_batch: Tensor) -> None:
    """Refuse a model whose logits of a sample depend on the others in its batch: the engine takes some of them out."""
    rows = min(len(logits), len(in_other_batch))
    gap = (logits[:rows] - in_other_batch[:rows]).abs().max().item()
    if gap > _MIXED[0 if _exact(logits) else 1] * logits.abs().max().item():
        raise NotCapturableError(
            f"{type(model).__name__}'s logits of a sample depend on the others in its batch (by {gap:.2e} here), so that "
            "those that leave would change the answers of those that stay; a BatchNorm needs running statistics"
        )


@contextmanager
def exact_attention() -> Iterator[None]:
    """Without ``nn.MultiheadAttention``'s inference fast path, a fused kernel that rounds differently (1e-6)."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _takes_other_lengths(captured: Capture) -> bool:
    """Whether the export left the sequence length open, or the forward fixed it."""
    placeholder = next(node for node in captured.graph.graph.nodes if node.op == "placeholder")
    size = placeholder.meta["val"].shape[1]
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _compare(
    captured: Capture, boundaries: Sequence[Boundary], partition: Partition, example: Example
) -> tuple[tuple[HookPoint, ...], Tensor]:
    """Where each feature is read, and the logits."""
    try:
        # Copies, because a stage may write into its input, as the backbone itself may.
        staged = partition.run([tensor.clone() for tensor in example.tensors])
    except Exception as error:
        raise NotCapturableError(
            f"the stages of {type(captured.backbone).__name__} do not run at batch size {len(example.tensors[0])} "
            f"({type(error).__name__}: {error}), so its forward fixes a size; make that size depend on x.shape"
        ) from error
    outputs, logits = _outputs_at(captured, boundaries, example)
    points = tuple(
        _hook_point(boundary, leaves, versions, feature)
        for boundary, (leaves, versions), feature in zip(boundaries, outputs, staged[:-1], strict=True)
    )
    if not _same(staged[-1], logits):
        _refuse("the result (its logits)", logits, staged[-1])
    return points, logits


def _outputs_at(
    captured: Capture, boundaries: Sequence[Boundary], example: Example
) -> tuple[list[tuple[list[Tensor], list[bool]]], Tensor]:
    """Copies of what each boundary's module call returned, whether it was written into later, and the logits."""
    found: dict[str, list[tuple[Tensor, int, Tensor]]] = {}

    def keep(name: str, output: Any) -> None:
        found[name] = [(leaf, leaf._version, leaf.clone()) for leaf in tensor_leaves(output)]

    watched = [(boundary.call.path, boundary.rank, partial(keep, boundary.name)) for boundary in boundaries]
    with on_calls(captured.backbone, watched):
        args, kwargs = captured.spec.call(tuple(tensor.clone() for tensor in example.tensors))
        logits = logits_of(captured.backbone(*args, **kwargs))
    missing = [boundary.name for boundary in boundaries if boundary.name not in found]
    if missing:
        raise NotCapturableError(
            f"module {missing[0]!r} was not called when the backbone ran, so no feature can be read there; if a part of it "
            "is compiled, attach before compiling"
        )
    reads = [found[boundary.name] for boundary in boundaries]
    return [([copy for _, _, copy in read], [leaf._version != old for leaf, old, _ in read]) for read in reads], logits


def _hook_point(boundary: Boundary, leaves: list[Tensor], written: list[bool], feature: Tensor) -> HookPoint:
    for leaf, tensor in enumerate(leaves):
        if _same(tensor, feature):
            return HookPoint(boundary.call.path, boundary.rank, leaf, written[leaf])
    near = next((tensor for tensor in leaves if tensor.shape == feature.shape), None)
    return _refuse(f"the output of module {boundary.name!r}", near, feature)


def _refuse(what: str, eager: Tensor | None, staged: Tensor) -> HookPoint:
    gap = "has another shape" if eager is None else f"differs by up to {(eager - staged).abs().max().item():.2e}"
    raise NotCapturableError(
        f"surgery refused: {what} {gap} between the captured graph and the model: its forward there depends on "
        "something that capture does not see (random numbers in eval mode, Python state)"
    )


def _same(first: Tensor, second: Tensor) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    tolerance = 0.0 if _exact(first) else _TOLERANCE.get(first.dtype, 1e-2)
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)


def _exact(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32
