"""A package on blocks of rows, as each of Ray's actors runs it; without Ray."""

from __future__ import annotations

import io
import pickle
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exitkit
from exitkit import ImagePreprocessing, TextPreprocessing
from exitkit.engine.program import Description
from exitkit.serving import dataset, ray_files
from exitkit.serving.dataset import Predictor
from exitkit.serving.service import Service
from exitkit.serving.settings import Settings
from exitkit.surgery.inputs import CallSpec
from tests.stages import staged_engine
from tests.test_serving_http import COSTS, LABELS, image_service, once, picture
from tests.toy import TinyNet


def predictor(monkeypatch: pytest.MonkeyPatch, engine: exitkit.Engine, **options: Any) -> Predictor:
    monkeypatch.setattr(dataset, "load", lambda *_, **__: engine)
    usual = {"package": "m.pt2", "column": "x", "id_column": None, "threshold": None, "on_error": "raise"}
    return Predictor(**{**usual, "batch_size": 4, "threads": 1, "device": None, "trust": True, **options})


def test_rows_are_answered_as_the_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, stages = staged_engine(Description(LABELS, None, COSTS))
    x = torch.rand(23, 3, generator=torch.Generator().manual_seed(0))
    expected = engine(x)
    stages[2].sizes.clear()
    rows = {"x": x.numpy()}
    rows["x"].flags.writeable = False  # as Ray hands them out
    got = predictor(monkeypatch, engine).answers(rows)
    assert list(got) == ["label", "exit", "score", "non_finite"]
    assert got["exit"].tolist() == expected.exit.tolist()
    assert got["score"].tolist() == expected.score.tolist()
    assert got["label"].tolist() == [LABELS[index] for index in expected.logits.argmax(1).tolist()]
    assert len(set(got["exit"].tolist())) == 3
    hard = int((expected.exit == 2).sum())
    assert stages[2].sizes == [4] * (hard // 4) + [hard % 4] * (hard % 4 > 0)  # filled up across batches


@pytest.mark.parametrize(("cpus", "actors", "num_cpus"), [(2, 4, 1), (4, 4, 1), (2, 2, 0.6)])
def test_actors_that_leave_no_cpu_to_read_with_are_named(cpus: float, actors: int, num_cpus: float) -> None:
    """Ray starts those that fit, and they wait for rows that no CPU is left to read."""
    with pytest.warns(UserWarning, match=f"actors={actors} with num_cpus={num_cpus} leave none of the .* {cpus} CPUs"):
        dataset._warn_if_actors_take_all(cpus, actors, num_cpus)


@pytest.mark.parametrize(("cpus", "actors", "num_cpus"), [(2, 1, 1), (5, 4, 1), (2, 2, 0.5), (1, 9, 0)])
def test_actors_that_leave_a_cpu_are_not(
    recwarn: pytest.WarningsRecorder, cpus: float, actors: int, num_cpus: float
) -> None:
    dataset._warn_if_actors_take_all(cpus, actors, num_cpus)
    assert not recwarn


def test_a_regression_answers_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the rows of a data set, and over HTTP."""
    from PIL import Image

    ee = exitkit.attach(TinyNet(num_classes=1), torch.zeros(2, 1, 8, 8), method="pbee").eval()
    described = Description(
        None, ImagePreprocessing((1, 8, 8), (0.0,), (1.0,)), tuple((f"{m}", 1.0) for m in range(4))
    )
    engine = replace(exitkit.compile(ee, float("inf")), description=described)
    out = io.BytesIO()
    Image.new("L", (8, 8), 51).save(out, "PNG")
    with torch.no_grad():
        wanted = float(ee.backbone(torch.full((1, 1, 8, 8), 0.2)))
    rows = {"x": np.array([out.getvalue(), b"no image"], object)}
    got = predictor(monkeypatch, engine, on_error="column").answers(rows)
    assert list(got) == ["value", "exit", "score", "non_finite", "error"]
    assert got["value"][0] == pytest.approx(wanted, abs=1e-5)
    assert np.isnan(got["value"][1])
    served = Service(engine, Settings("m.pt2"))
    document = once(served, "POST", "/predict", out.getvalue(), "image/png")[1]
    assert document["value"] == pytest.approx(wanted, abs=1e-5)
    assert "label" not in document
    entry = {"name": engine.inputs.names[0], "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.2] * 64}
    document = once(Service(engine, Settings("m.pt2")), "POST", "/v2/models/m/infer", {"inputs": [entry]})[1]
    told = once(Service(engine, Settings("m.pt2")), "GET", "/v2/models/m")[1]
    for one in (document, told):
        assert [output["name"] for output in one["outputs"]] == ["logits", "value", "exit", "score", "non_finite"]
    answer, declared = document["outputs"][1], told["outputs"][1]
    assert (answer["datatype"], answer["shape"], answer["data"]) == ("FP32", [1], [pytest.approx(wanted, abs=1e-5)])
    assert (declared["datatype"], declared["shape"]) == ("FP32", [-1])


def test_a_regression_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy has no bfloat16, and every row's number ended in its error."""
    x = torch.rand(3, 1, 8, 8).bfloat16()
    ee = exitkit.attach(TinyNet(num_classes=1).bfloat16(), x, method="pbee").eval()
    made = predictor(monkeypatch, exitkit.compile(ee, float("inf")))
    answers = made._answered(dict(enumerate(x)), 3)
    with torch.no_grad():
        np.testing.assert_allclose(answers["value"], ee.backbone(x)[:, 0].double(), rtol=1e-2)


def test_bad_rows_fail_by_their_id_or_are_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (5, 5), (255, 0, 0)).save(out, "PNG")
    good = out.getvalue()
    rows = {"x": np.array([good, good[:30], good], object), "id": np.array(["a", "b", "c"], object)}
    engine = image_service().engine
    with pytest.raises(exitkit.ArgumentError, match=r"row 'b': .*cannot be read as an image.*on_error='column'"):
        predictor(monkeypatch, engine, id_column="id").answers(rows)
    with pytest.raises(exitkit.ArgumentError, match="row 1 of its block"):
        predictor(monkeypatch, engine).answers(rows)
    got = predictor(monkeypatch, engine, on_error="column").answers(rows)
    assert got["exit"].tolist() == [0, -1, 0]
    assert got["label"].tolist() == ["cat", None, "cat"]
    assert np.isnan(got["score"]).tolist() == [False, True, False]
    assert [reason is None for reason in got["error"]] == [True, False, True]


def test_columns_have_one_type_in_all_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks with and without bad rows could not be read as one table; whole numbers with gaps became floating ones."""
    pyarrow, _ = pytest.importorskip("pyarrow"), pytest.importorskip("ray")
    from pyarrow import parquet

    answering = predictor(monkeypatch, image_service().engine, on_error="column")
    large = 2**60 + 1
    for number, images in enumerate([[picture(), picture()], [b"none", picture()], [b"none", b"none"]]):
        table = pyarrow.table({"x": images, "id": [large, None], "path": [None, None] if number else ["a", "b"]})
        kinds = table.schema.set(2, pyarrow.field("path", pyarrow.string()))
        parquet.write_table(answering(table.cast(kinds)), tmp_path / f"{number}.parquet")
    rows = parquet.read_table(tmp_path).to_pylist()
    assert list(rows[0]) == ["id", "path", "label", "exit", "score", "non_finite", "error"]
    assert [row["label"] for row in rows] == ["cat", "cat", None, "cat", None, None]
    assert [row["error"] is None for row in rows] == [True, True, False, True, False, False]
    assert [row["id"] for row in rows] == [large, None] * 3
    assert [row["path"] for row in rows] == ["a", "b", None, None, None, None]


class _Answered:
    """What the data set that is answered is asked for: the rows, as Ray's processes write them."""

    def __init__(self, rows: dict[str, Any] | Exception) -> None:
        self.rows = rows

    def write_parquet(self, folder: str) -> None:
        from pyarrow import parquet, table

        if isinstance(self.rows, Exception):
            raise self.rows
        parquet.write_table(table(self.rows), f"{folder}/part.parquet")


def test_what_is_written_is_for_all_who_may_read_and_says_what_was_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder was for its owner alone, and a damaged file ended in a traceback."""
    pytest.importorskip("pyarrow")
    (tmp_path / "texts.csv").write_text("text\ngood\n")
    rows = {"label": [1, 2, 0, None], "exit": [0, 2, 0, -1], "cut": [False, True, False, False]}
    answered: list[Any] = [
        _Answered(rows),
        _Answered(RuntimeError("in another process\n  at line 3\nthe disk is full\n")),
    ]
    monkeypatch.setattr(ray_files, "joined", lambda *_: nullcontext())
    monkeypatch.setattr(ray_files, "_read", lambda _: (None, "text"))
    monkeypatch.setattr(ray_files, "predict", lambda *_, **__: answered.pop(0))
    out, source = tmp_path / "new" / "out.parquet", str(tmp_path / "texts.csv")
    said = ray_files.write_predictions(Path("m.pt2"), source, None, out, actors=1)
    assert said.startswith(
        "3 answered: 2 at exit 0, 1 at exit 2; 1 could not be read (column error); 1 were longer than"
    )
    (tmp_path / "usual").mkdir()
    assert out.stat().st_mode == (tmp_path / "usual").stat().st_mode
    with pytest.raises(
        exitkit.ExitkitError, match=r"texts.csv' cannot be answered: RuntimeError: the disk is full; nothing"
    ):
        ray_files.write_predictions(Path("m.pt2"), source, None, tmp_path / "new" / "again.parquet", actors=1)
    assert [path.name for path in out.parent.iterdir()] == ["out.parquet"]


def test_texts_of_digits_are_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A column of years was one of numbers, and every row an error."""
    pytest.importorskip("pyarrow")
    from pyarrow import csv

    data = pytest.importorskip("ray.data")
    read: list[Any] = []

    class Table:
        def __init__(self, path: str, **options: Any) -> None:
            options = pickle.loads(pickle.dumps(options))  # as they come to another process
            read.append(csv.open_csv(path, **options).read_all())

        def columns(self) -> list[str]:
            return list(read[0].column_names)

    monkeypatch.setattr(data, "read_csv", Table)
    (tmp_path / "a.csv").write_text('text,number\n2024,1\n"7\n8",2\n')
    assert ray_files._read(str(tmp_path / "a.csv"))[1] == "text"
    assert read[0].to_pydict() == {"text": ["2024", "7\n8"], "number": [1, 2]}


def test_images_as_arrays_of_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.empty(2, object)
    values[0], values[1] = np.full((9, 4, 3), 255, np.uint8), np.zeros((5, 5), np.uint8)
    engine = image_service().engine
    got = predictor(monkeypatch, engine).answers({"x": values})
    assert got["exit"].tolist() == [0, 2]  # white is sure at once, black is never
    assert isinstance(engine.description, Description)
    assert isinstance(engine.description.preprocessing, ImagePreprocessing)


def test_texts_go_by_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    reader = TextPreprocessing(backend.to_str(), ("[PAD]", 0), 40, ("input_ids", "attention_mask"))
    engine, stages = staged_engine(Description(None, reader, COSTS))
    lengths: list[int] = []

    def first(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        lengths.append(ids.shape[1])
        count = mask.sum(1).float() + 1
        return stages[0](torch.stack([torch.zeros(len(ids)), (ids == 2).any(1).float(), count], 1))

    program = engine.loop.program
    names = ("input_ids", "attention_mask")
    inputs = replace(
        program.inputs,
        names=names,
        sizes=((None, None),) * 2,
        dtypes=(torch.int64,) * 2,
        tables=(None, None),
        spec=CallSpec((), (), names),
    )
    steps = (replace(program.steps[0], run=first, inputs=names), *program.steps[1:])
    axes = {**program.axes, **dict.fromkeys(names, 0)}
    loop = replace(engine.loop, program=replace(program, inputs=inputs, steps=steps, axes=axes))
    texts = ["good", "bad " * 30, "good " * 3, "no", "bad " * 20, "good bad", "bad " * 39, "a b"]
    got = predictor(monkeypatch, replace(engine, loop=loop)).answers({"x": np.array(texts, object)})
    assert got["cut"].tolist() == [False] * 8
    assert got["exit"].tolist() == [1, 2, 1, 2, 2, 1, 2, 2]
    assert got["label"].tolist() == [2] * 8  # of (0, good or not, tokens + 1) the last is the largest
    assert lengths == [16, 40]  # a multiple of 16, and at most 40
    assert stages[0].rows == [2, 3, 2, 3, 4, 21, 31, 40]  # by their characters


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros((2, 4), np.float32), r"has shape \(1, 4\)"),
        (np.zeros((2, 3)), "float64"),
        (np.array(["a", "b"], object), "of which no tensor can be made"),
    ],
)
def test_a_column_of_another_kind(monkeypatch: pytest.MonkeyPatch, value: Any, said: str) -> None:
    with pytest.raises(exitkit.ArgumentError, match=f"row 0 of its block: .*{said}"):
        predictor(monkeypatch, staged_engine()[0]).answers({"x": value})
