"""``collect``: one pass over a data loader, all exits recorded."""

from __future__ import annotations

import errno
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exitkit.common.batches import check_labels, checked, move, split_batch
from exitkit.common.checks import PATH, check
from exitkit.common.console import tracked
from exitkit.common.errors import ArgumentError
from exitkit.common.files import WriteError, make_folder, unwritten
from exitkit.common.hashes import hash_samples
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.evaluation.regression import RegressionOutputs
from exitkit.multi_exit.calling import call_model
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.capturing import evaluation_mode
from exitkit.surgery.fingerprint import fingerprint_of
from exitkit.surgery.inputs import as_call
from exitkit.surgery.mistakes import not_finite, other_size


def collect(
    model: MultiExitModel, loader: Iterable[Any], path: str | Path | None = None, *, show_progress: bool = True
) -> ExitOutputs:
    """Run every exit on every sample of ``loader``, in eval mode on the model's device.

    Args:
        model: what :func:`exitkit.attach` returned.
        loader: yields ``(inputs, labels)``, dicts with ``labels``, or inputs alone (then labels are None).
        path: a safetensors file to write to as batches come, in float16, for outputs larger than memory: what is returned
            reads from it. float16 moves scores by up to 5e-4. By default everything is kept in memory, in float32.
        show_progress: on stderr, a bar where there is a terminal, elsewhere a line every ten seconds.

    Raises:
        ArgumentError: an empty loader, inputs that do not run, labels out of range, labels in some batches only, NaN in the
            inputs or outputs.
        WriteError: a folder that cannot be written.

    Returns:
        For a model with one output :class:`RegressionOutputs`, whose labels are numbers.
    """
    if not isinstance(model, MultiExitModel):
        raise ArgumentError(f"model is {type(model).__name__}; collect takes what exitkit.attach(model) returns")
    check("path", path, PATH | None)
    batches = tracked(checked(loader, "loader"), "batches collected", loader, show_progress)
    if path is None or model.regression:
        kept: list[Tensor] = []
        collected = _run(model, batches, kept.append).outputs(torch.cat(kept))
        if path is not None:
            collected.save(path)
        return collected
    make_folder(Path(path).parent)
    with _full_disk_named(path), tempfile.NamedTemporaryFile(dir=Path(path).parent, prefix=".collect-") as spool:
        seen = _run(model, batches, lambda log_probs: spool.write(log_probs.half().numpy().tobytes()))
        spool.flush()
        shape = (len(torch.cat(seen.hashes)), len(model.exits), model.num_classes)
        size = shape[0] * shape[1] * shape[2]
        mapped = torch.from_file(spool.name, shared=True, size=size, dtype=torch.float16)
        seen.outputs(mapped.view(shape)).save(path)
    return ExitOutputs.load(path)


@contextmanager
def _full_disk_named(path: str | Path) -> Iterator[None]:
    """A full disk as the error of the file that is written; what a data set cannot read stays its own."""
    try:
        yield
    except OSError as error:
        if isinstance(error, WriteError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise unwritten(path, error) from error


@dataclass
class _Seen:
    """What a pass leaves beside the log-probabilities."""

    model: MultiExitModel
    labels: list[Tensor] = field(default_factory=list)
    hashes: list[Tensor] = field(default_factory=list)
    dtype: str = "float32"

    def outputs(self, log_probs: Tensor) -> ExitOutputs:
        given = (
            log_probs,
            torch.cat(self.labels) if self.labels else None,
            torch.tensor([exit_.macs for exit_ in self.model.exits], dtype=torch.float64),
            float(self.model.anatomy.macs),
            self.model.method.score.name,
            torch.cat(self.hashes),
            self.dtype,
        )
        weights = fingerprint_of(self.model.backbone)
        if self.model.regression:
            return RegressionOutputs(*given, weights=weights)
        return ExitOutputs(*given, weights=weights)


def _run(model: MultiExitModel, batches: Iterable[Any], keep: Callable[[Tensor], Any]) -> _Seen:
    """One pass; ``keep`` is given each batch's log-probabilities (n, M+1, C), float32."""
    device, seen, other = next(model.parameters()).device, _Seen(model), None
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            inputs, labels = split_batch(batch)
            answers = call_model(model, model, move(inputs, device)).logits
            logits = torch.stack(answers, dim=1)
            log_probs = logits.float() if model.regression else F.log_softmax(logits.float(), dim=-1)
            if bool(log_probs.isnan().any()) and (mistake := not_finite(inputs)) is not None:
                raise ArgumentError(mistake)
            keep(log_probs.cpu())
            seen.hashes.append(hash_samples(inputs))
            seen.dtype = str(answers[-1].dtype).removeprefix("torch.")
            if other is None and (other := other_size(as_call(model.example.spec.understood(inputs)), model.example)):
                warnings.warn(f"{other}: costs and budgets are those of the attached size", stacklevel=3)
            if labels is not None or seen.labels:
                seen.labels.append(check_labels(labels, model.num_classes, len(logits)).cpu())
    return seen
