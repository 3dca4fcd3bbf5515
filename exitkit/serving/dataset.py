"""Data sets larger than a machine: a package on every row of a Ray data set, one loaded package in each actor."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitkit.calibration.monitor import ShiftMonitor, ShiftReport
from exitkit.common.checks import PATH, Count, NonNegative, check
from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.engine import Engine
from exitkit.methods.policy import Threshold
from exitkit.multi_exit.image_files import prepared_image
from exitkit.multi_exit.preprocessing import ImagePreprocessing, TextPreprocessing
from exitkit.packages import load
from exitkit.serving.deployment import import_ray
from exitkit.serving.uploads import padded

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

Rows = dict[str, NDArray[Any]]
OnError = Literal["raise", "column"]


def predict(
    dataset: Dataset,
    package: str | PathLike[str],
    *,
    column: str,
    id_column: str | None = None,
    threshold: Threshold | None = None,
    on_error: OnError = "raise",
    batch_size: int = 64,
    block: int = 4096,
    actors: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    device: str | None = None,
    trust: bool = False,
    keep_order: bool = False,
) -> Dataset:
    """Answer every row of a Ray data set with a package; the result is lazy, as Ray's data sets are.

    One actor holds one loaded package. It is given ``block`` rows at a time, inside of which samples of all batches wait
    together before each stage (:meth:`exitkit.Engine.map`); texts go by their length. An actor that dies is started again,
    and its rows are answered by another.

    Args:
        dataset: rows with images (arrays (H, W) or (H, W, C) of uint8, or the bytes of a file), texts, or tensors as the
            package takes them.
        package: what :func:`exitkit.export` wrote, readable on every machine; not a single ``.onnx``.
        column: the column of the inputs.
        id_column: by which a bad row is named; by default by its place in its block.
        threshold: another τ than the package's, or one for each exit, or a policy.
        on_error: whether a row that cannot be read fails the job, or gets its reason in a column ``error`` (null for others),
            the label −1 (null where there are names; of a regression the value NaN), the exit −1 and a score of NaN.
        batch_size: samples that a stage runs on at once.
        block: rows that an actor is given at once.
        actors: how many processes answer. Reading and writing need a CPU beside theirs, so a warning says if they take all.
        num_cpus: of each; torch uses so many threads.
        num_gpus: of each.
        device: by default a GPU where ``num_gpus`` is above 0.
        trust: that the code in a ``.pt2`` is trusted, as for :func:`exitkit.load`.
        keep_order: keep the rows' order; the data sets that this one is made of share the setting.

    Returns:
        The rows without ``column``, and with ``label`` (the class's name, or its number; of a regression ``value``), ``exit``,
        ``score`` and ``non_finite``; of texts also ``cut``, whether the text was longer than the package takes. Columns of
        these names are replaced.

    Raises:
        ArgumentError: arguments out of range, a column that is missing, a package that cannot be loaded here.
        ExitkitError: Ray is not installed.
    """
    ray = import_ray()
    from ray import data as ray_data

    if not isinstance(dataset, ray_data.Dataset):
        raise ArgumentError(
            f"dataset is {type(dataset).__name__}; give a ray.data.Dataset, such as ray.data.read_images(…)"
        )
    check("package", package, PATH)
    for name, count in {"batch_size": batch_size, "block": block, "actors": actors}.items():
        check(name, count, Count)
    for name, share in {"num_cpus": num_cpus, "num_gpus": num_gpus}.items():
        check(name, share, NonNegative)
    check("on_error", on_error, OnError)
    names = dataset.columns() or []
    for name in (column, *([] if id_column is None else [id_column])):
        if name not in names:
            raise ArgumentError(f"column {name!r} is missing; the data set has {names}")
    target = device if device is not None else "cuda" if num_gpus else None
    options: dict[str, Any] = {
        "package": str(Path(package).absolute()), "column": column, "id_column": id_column, "threshold": threshold,
        "on_error": on_error, "batch_size": batch_size, "threads": max(int(num_cpus), 1), "device": target, "trust": trust,
    }  # fmt: skip
    if num_gpus == 0:
        Predictor(**options)  # refused here, in the caller's words, rather than in an actor
    _warn_if_actors_take_all(ray.cluster_resources().get("CPU", 0), actors, num_cpus)
    answered = dataset.map_batches(
        Predictor,
        fn_constructor_kwargs=options,
        batch_size=block,
        batch_format="pyarrow",
        compute=ray_data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        udf_modifying_row_count=False,
    )
    if keep_order:
        answered.context.execution_options.preserve_order = True
    return answered


def _warn_if_actors_take_all(cpus: float, actors: int, num_cpus: float) -> None:
    """Actors hold their CPUs to the end, and reading and writing wait for one: for ever, where no machine joins."""
    if num_cpus and actors * num_cpus + 1 > cpus:
        warnings.warn(
            f"actors={actors} with num_cpus={num_cpus:g} leave none of the cluster's {cpus:g} CPUs to read and write rows "
            "with, and Ray waits until more join; give fewer actors, or a smaller num_cpus",
            stacklevel=3,
        )


def shift(answered: Dataset, monitor: ShiftMonitor) -> ShiftReport:
    """Tell one monitor of the answers of all actors: one verdict, and one probability of a false alarm.

    Args:
        answered: what :func:`predict` returned, best materialised or read again from where it was written: a lazy one is
            answered once more.
        monitor: of the package's policy.
    """
    for rows in answered.select_columns(["exit", "score", "non_finite"]).iter_batches(
        batch_size=4096, batch_format="numpy"
    ):
        sound = ~rows["non_finite"].astype(bool) & (rows["exit"] >= 0)
        monitor.update(rows["exit"][sound].astype(np.int64), rows["score"][sound])
    return monitor.report()


class Predictor:
    """One loaded package that answers blocks of rows; the arguments are :func:`predict`'s."""

    def __init__(
        self,
        package: str,
        column: str,
        id_column: str | None,
        threshold: Threshold | None,
        on_error: OnError,
        batch_size: int,
        threads: int,
        device: str | None,
        trust: bool,
    ) -> None:
        torch.set_num_threads(threads)
        engine = load(package, threshold=threshold, device=device, trust=trust)
        if not isinstance(engine, Engine):
            raise ArgumentError(
                f"package={package!r} answers one sample after another; export it as .pt2, or as .onnx.zip"
            )
        self.engine, self.batch_size = engine, batch_size
        self.column, self.id_column, self.on_error = column, id_column, on_error
        self.regression = engine.loop.program.num_classes == 1
        described = engine.description
        self.labels = None if described is None else described.labels
        self.preprocessing = None if described is None else described.preprocessing
        if len(engine.inputs.names) > 1 and not isinstance(self.preprocessing, TextPreprocessing):
            raise ArgumentError(
                f"package={package!r} takes {len(engine.inputs.names)} tensors, and a column holds one"
            )

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """The rows without their inputs, and with their answers."""
        import pyarrow
        from ray.data.block import BlockAccessor

        read = [self.column, *([] if self.id_column is None else [self.id_column])]
        rows: Any = BlockAccessor.for_block(table).to_numpy(read)
        answers = self.answers(rows)
        # texts also where all are null: with columns of other types in other blocks, what is written could not be read
        columns = {
            name: pyarrow.array(values, pyarrow.string() if values.dtype == object else None)
            for name, values in answers.items()
        }
        kept = {name: table[name] for name in table.column_names if name != self.column}
        return pyarrow.table({**kept, **columns})

    def answers(self, rows: Rows) -> Rows:
        """The columns of answers to the column of inputs."""
        values = rows[self.column]
        made, reasons = self._prepared(values, rows.get(self.id_column) if self.id_column else None)
        answers = self._answered(made, len(values))
        return answers if self.on_error == "raise" else {**answers, "error": np.array(reasons, object)}

    def _prepared(self, values: NDArray[Any], ids: NDArray[Any] | None) -> tuple[dict[int, Any], list[str | None]]:
        """Each row as the package takes it, by its place, and what is wrong with the others."""
        made: dict[int, Any] = {}
        reasons: list[str | None] = [None] * len(values)
        for place, value in enumerate(values):
            try:
                made[place] = self._one(value)
            except ExitkitError as error:
                name = f"row {place} of its block" if ids is None else f"row {ids[place]!r}"
                if self.on_error == "raise":
                    raise ArgumentError(f"{name}: {error}; on_error='column' sets such rows aside") from error
                reasons[place] = str(error)
        return made, reasons

    def _one(self, value: Any) -> Any:
        """One image as a tensor (C, H, W), a text as it is, or a tensor that fits."""
        if isinstance(self.preprocessing, ImagePreprocessing):
            if isinstance(value, bytes):
                return prepared_image("the image", self.preprocessing, io.BytesIO(value))
            return self.preprocessing.transform(np.array(value)) if _is_image(value) else self._tensor(value)
        if isinstance(self.preprocessing, TextPreprocessing):
            if not isinstance(value, str):
                raise ArgumentError(f"the value is {type(value).__name__}, and this package takes texts")
            return value
        return self._tensor(value)

    def _tensor(self, value: Any) -> Tensor:
        try:
            tensor = torch.from_numpy(np.array(value))  # a copy: what Ray hands out is read-only
        except TypeError as error:
            raise ArgumentError(f"the value is {type(value).__name__}, of which no tensor can be made") from error
        inputs = self.engine.inputs
        inputs.placed(inputs.spec.batch((tensor[None],)))
        return tensor

    def _answered(self, made: Mapping[int, Any], count: int) -> Rows:
        """Columns for all rows, in their order."""
        answers: Rows = {
            **self._unanswered(count),
            "exit": np.full(count, -1),
            "score": np.full(count, np.nan),
            "non_finite": np.zeros(count, bool),
        }
        cut, groups = np.zeros(count, bool), list(self._groups(made))

        def batches() -> Iterator[Any]:
            for group in groups:
                batch, cut[group] = self._batch([made[place] for place in group])
                yield self.engine.inputs.placed(batch)

        for group, answer in zip(groups, self.engine.map(batches(), self.batch_size), strict=True):
            for name, value in zip(answers, (self._said(answer.logits), *answer[1:]), strict=True):
                answers[name][group] = value.cpu().numpy() if isinstance(value, Tensor) else value
        return {**answers, "cut": cut} if isinstance(self.preprocessing, TextPreprocessing) else answers

    def _unanswered(self, count: int) -> Rows:
        """The column of what is said, before anything is."""
        if self.regression:
            return {"value": np.full(count, np.nan)}
        return {"label": np.full(count, -1) if self.labels is None else np.full(count, None, object)}

    def _said(self, logits: Tensor) -> Any:
        """A batch's values for that column: numbers of a regression; else classes, by name where there are names."""
        if self.regression:
            return logits[:, 0].double()  # numpy has no bfloat16
        label = logits.argmax(1).tolist()
        return label if self.labels is None else [self.labels[one] for one in label]

    def _groups(self, made: Mapping[int, Any]) -> Iterator[list[int]]:
        """Places of one batch each: tensors of one shape, or texts of nearly one length, so that little is padded."""
        text = isinstance(self.preprocessing, TextPreprocessing)
        places = sorted(made, key=lambda place: len(made[place])) if text else list(made)
        shapes = dict.fromkeys(() if text else made[place].shape for place in places)
        for shape in shapes:
            alike = [place for place in places if text or made[place].shape == shape]
            yield from (alike[at : at + self.batch_size] for at in range(0, len(alike), self.batch_size))

    def _batch(self, samples: Sequence[Any]) -> tuple[Any, list[bool]]:
        """Samples as the package takes them, and which texts were cut."""
        if isinstance(self.preprocessing, TextPreprocessing):
            tensors, cut = self.preprocessing.encode(samples)
            return padded(tensors, self.preprocessing), cut
        return self.engine.inputs.spec.batch((torch.stack(list(samples)),)), [False] * len(samples)


def _is_image(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8
