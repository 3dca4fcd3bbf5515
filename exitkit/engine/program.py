"""A program: what the engine's loop runs, as functions of tensors; made from a model, or read from a package."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.preprocessing import Preprocessing
from exitkit.surgery.inputs import CallSpec
from exitkit.surgery.mistakes import mistake_of

Run = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Step:
    """One stage of the backbone and the exit behind it.

    Attributes:
        run: takes the values named ``inputs``; returns those named ``outputs``, then the exit's answer (B, C) and its
            score (B,) float64.
        exit: the exit's number; M is the backbone's own classifier.
        decides: whether samples may leave here; where not, there is neither answer nor score.
        inputs, outputs: names of values.
        live: every value that must outlive this step, those of earlier ones included.
        stage: ``run`` without the exit, where it may be left out.
    """

    run: Run
    exit: int
    decides: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    live: tuple[str, ...]
    stage: Run | None = None


@dataclass(frozen=True)
class Inputs:
    """What a program takes.

    Attributes:
        spec: how it is called.
        names: what the steps call the input tensors.
        sizes: the shape of each, the batch first; None where any size is taken.
        dtypes: of each.
        tables: the rows of the table in which an input's numbers are looked up, as a vocabulary; None where they are not.
        device: where all of them are.
        longest: tokens of a text, at most; None where nothing limits them.
    """

    spec: CallSpec
    names: tuple[str, ...]
    sizes: tuple[tuple[int | None, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    tables: tuple[int | None, ...]
    device: torch.device
    longest: int | None = None

    def checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The tensors of a call in the program's order.

        Numbers that are looked up in a table, such as token ids, are compared with it on a CPU alone: on a GPU the host would
        have to wait for them. A compiled step ends the process where one is beyond the table; see :meth:`placed`.

        Raises:
            ArgumentError: other tensors than the model was attached with: names, sizes, dtype or device; inputs of a text
                that differ in length, numbers beyond the table; or a process that was forked from the one in which the engine
                on a GPU was made.
        """
        if self.device.type == "cuda" and torch.cuda._is_in_bad_fork():
            raise ArgumentError(
                "the engine was made before this process was forked, and CUDA cannot be used in both; start processes with "
                "multiprocessing's 'spawn', and compile or load the engine in each"
            )
        if args and kwargs:
            raise self.spec.other_call([*range(len(args)), *kwargs])
        tensors = self.spec.tensors(kwargs or args)
        self._check(tensors, self.device)
        return tensors

    def placed(self, batch: Any) -> Any:
        """A batch on the CPU, checked as :meth:`checked` does on a CPU, and then put on the program's device.

        Raises:
            ArgumentError: other tensors than the model was attached with.
        """
        tensors = self.spec.tensors(batch)
        self._check(tensors, torch.device("cpu"))
        return self.spec.batch(tuple(tensor.to(self.device) for tensor in tensors))

    def _check(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        for key, tensor, sizes, dtype in zip(self.spec.keys, tensors, self.sizes, self.dtypes, strict=True):
            shape = tensor.shape
            fits = len(shape) == len(sizes) and shape[:1] == tensors[0].shape[:1]
            fits = fits and (shape[1:] == sizes[1:] or all(map(_fits, sizes[1:], shape[1:])))
            fits = fits and tensor.layout == torch.strided
            if not fits or tensor.dtype != dtype or tensor.device != device:
                raise ArgumentError(
                    mistake_of(key, tensor, sizes, dtype) or self._unfit(key, tensor, sizes, dtype, fits)
                )
            if self.longest is not None and shape[1] > self.longest:
                raise ArgumentError(
                    f"input {key!r} has {shape[1]} tokens, and the model has {self.longest} positions; cut texts when they "
                    f"are tokenised: tokenizer(…, truncation=True, max_length={self.longest})"
                )
        lengths = [tensor.shape[1] for tensor, sizes in zip(tensors, self.sizes, strict=True) if None in sizes[1:]]
        if len({*lengths}) > 1:
            raise ArgumentError(
                f"inputs {list(self.spec.keys)} have {lengths} tokens, and must have the same number; pad them together, as "
                "the tokenizer does"
            )
        if device.type == "cpu":
            self._check_lookups(tensors)

    def _check_lookups(self, tensors: Sequence[Tensor]) -> None:
        for key, tensor, rows in zip(self.spec.keys, tensors, self.tables, strict=True):
            if rows is None or not tensor.numel():
                continue
            least, most = map(int, torch.aminmax(tensor))
            if least < 0 or most >= rows:
                raise ArgumentError(
                    f"input {key!r} holds {least if least < 0 else most}, and the model knows 0 to {rows - 1}; take the "
                    "tokenizer that belongs to the model"
                )

    def _unfit(
        self, key: int | str, tensor: Tensor, sizes: Sequence[int | None], dtype: torch.dtype, fits: bool
    ) -> str:
        """What is said of an input of another size, or else of another dtype or on another device."""
        if not fits:
            taken = ", ".join("any" if size is None else str(size) for size in sizes[1:])
            return (
                f"input {key!r} has shape {tuple(tensor.shape)}; the engine was compiled for (batch, {taken}), the "
                "same batch in every input. Resize it, or attach with example_inputs of this size"
            )
        return (
            f"input {key!r} is {tensor.dtype} on {tensor.device}; the engine takes {dtype} on {self.device}: "
            f"call .to({str(self.device)!r}, {dtype})"
        )


def _fits(size: int | None, own: int) -> bool:
    return own > 0 if size is None else size == own


@dataclass(frozen=True)
class Program:
    """Everything the loop needs to know of a model.

    Attributes:
        inputs: what it takes.
        steps: in order; the last ends in the backbone's own classifier.
        axes: the dimension in which a value has its samples, by name; a value not named is the same for every sample.
        dynamic: the dimensions of a value that follow the batch or the length of a text, by name.
        num_classes: C.
        dtype: of the logits that are returned, the widest of all exits.
    """

    inputs: Inputs
    steps: tuple[Step, ...]
    axes: dict[str, int]
    dynamic: dict[str, tuple[int, ...]]
    num_classes: int
    dtype: torch.dtype

    def without(self, exits: Collection[int]) -> Program:
        """The same program in which the steps of these exits run their stage alone; numbers stay as they are."""
        return replace(self, steps=tuple(_bare(step) if step.exit in exits else step for step in self.steps))


def _bare(step: Step) -> Step:
    assert step.stage is not None
    return replace(step, run=step.stage, decides=False)


@dataclass(frozen=True)
class Description:
    """What a package says beside its program and its policy.

    Attributes:
        labels: a name for each class, or None.
        preprocessing: from images or texts to inputs, or None.
        exits: name and share of the backbone's MACs of each exit, the backbone's own classifier last.
    """

    labels: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    exits: tuple[tuple[str, float], ...]
