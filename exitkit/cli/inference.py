"""Running a package on images and texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch

from exitkit.cli.inputs import Losses, images, pairs, texts
from exitkit.common.errors import ArgumentError
from exitkit.engine import Engine
from exitkit.multi_exit.preprocessing import ImagePreprocessing, Preprocessing
from exitkit.packages.answers import label_of, said
from exitkit.packages.onnx_branches import OnnxBranches
from exitkit.surgery.inputs import call_on

T = TypeVar("T")


def predict(
    package: Engine | OnnxBranches,
    inputs: Sequence[str],
    batch: int,
    losses: Losses,
    top: int = 1,
    paired: bool = False,
) -> Iterator[dict[str, Any]]:
    """One record for each image or text: the input, its label or value, the exit it left at, and the score there.

    Args:
        package: a loaded package.
        inputs: images and folders of them, or texts and files of them; ``-`` is stdin.
        batch: how many are answered at once.
        losses: is told of images that cannot be read, which are left out, and of texts that were cut.
        top: above 1, so many labels are added, the most likely first, with their probabilities at that exit.
        paired: whether texts are pairs, the first two columns of files.

    Raises:
        ArgumentError: a package that does not say how inputs become tensors, images for texts or the other way round, a
            path that does not exist, pairs that are none, or ``top`` of a regression or above the classes.
    """
    labels = None if package.description is None else package.description.labels
    for names, made in _batches(_preprocessing(package), inputs, batch, losses, paired):
        answer = call_on(package, package.inputs.placed(made))
        for name, logits, exit_, score in zip(names, answer.logits, answer.exit, answer.score, strict=True):
            if top > 1 and len(logits) == 1:
                raise ArgumentError(f"--top {top} counts classes, and a regression has none; leave it out")
            if top > len(logits):
                raise ArgumentError(
                    f"--top {top} is more than the package's {len(logits)} classes; give at most as many"
                )
            record: dict[str, Any] = {
                "input": name,
                **said(logits, labels),
                "exit": int(exit_),
                "score": round(float(score), 6) if score.isfinite() else None,
            }
            yield record | ({"top": _most_likely(logits, top, labels)} if top > 1 else {})


def _most_likely(logits: torch.Tensor, count: int, labels: Sequence[str] | None) -> list[dict[str, Any]]:
    probabilities = logits.double().softmax(-1)
    order = probabilities.argsort(descending=True)[:count]
    return [{"label": label_of(int(i), labels), "probability": round(float(probabilities[i]), 6)} for i in order]


def _batches(
    preprocessing: Preprocessing, inputs: Sequence[str], size: int, losses: Losses, paired: bool = False
) -> Iterator[tuple[Sequence[Any], Any]]:
    """Names of inputs, and the tensors made of them."""
    if isinstance(preprocessing, ImagePreprocessing):
        if paired:
            raise ArgumentError("--pairs is for texts, and this package takes images; leave it out")
        for group in _grouped(images(inputs, preprocessing, losses), size):
            names, tensors = zip(*group, strict=True)
            yield names, torch.stack(tensors)
    else:
        found: Iterator[Any] = pairs(inputs) if paired else texts(inputs)
        for sentences in _grouped(found, size):
            made, cut = preprocessing.encode(sentences)
            losses.cut += sum(cut)
            yield sentences, made


def _grouped(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while group := list(islice(items, size)):
        yield group


def tensors_of(package: Engine | OnnxBranches, inputs: Sequence[str], most: int) -> Any:
    """The first ``most`` of the images or texts as one batch of the package's inputs, on its device.

    Raises:
        ArgumentError: as :func:`predict`, or not one that can be read.
    """
    losses = Losses()
    batch = next(_batches(_preprocessing(package), inputs, most, losses), None)
    if batch is None:
        raise ArgumentError(f"of {list(inputs)[:3]} nothing can be read: {(losses.skipped or ['it is empty'])[0]}")
    return package.inputs.placed(batch[1])


def _preprocessing(package: Engine | OnnxBranches) -> Preprocessing:
    preprocessing = None if package.description is None else package.description.preprocessing
    if preprocessing is None:
        raise ArgumentError(
            "this package does not say how images or texts become tensors; export it with preprocessing= or tokenizer=, or "
            "call exitkit.load(path) on tensors"
        )
    return preprocessing
