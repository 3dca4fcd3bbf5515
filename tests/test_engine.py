"""The engine: equal to one sample at a time, to the training view, and to the backbone when no sample leaves."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import exitkit
from exitkit import ArgumentError, ExitkitError
from exitkit.methods.policy import ExitPolicy
from tests.toy import TinyNet, images, noisy

METHODS: dict[str, Any] = {
    "sdn": "sdn",
    "pbee": "pbee",
    "ztw": "ztw",
    "additive": exitkit.ZTW(ensemble="additive", ensemble_final=True),
    "margin": exitkit.SDN(criterion="margin"),
    "entropy": exitkit.ZTW(criterion="entropy"),
    "gpf": "gpf",
    "nats": exitkit.BranchyNet(nats=True),
    "mean": exitkit.SDN(ensemble="mean"),
}


@pytest.fixture(scope="module")
def models() -> dict[str, exitkit.MultiExitModel]:
    torch.manual_seed(0)
    net = TinyNet().eval()
    return {name: noisy(exitkit.attach(net, images(), head="conv", method=method)) for name, method in METHODS.items()}


def _expected(ee: exitkit.MultiExitModel, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Exits and answers from every exit's stored predictions."""
    outputs = exitkit.collect(ee, [x])
    exits = torch.from_numpy(outputs.exits_at(threshold))
    with torch.no_grad():
        logits = torch.stack([answer.float() for answer in ee(x).logits], 1)
    return exits, logits[torch.arange(len(x)), exits]


def _thresholds(ee: exitkit.MultiExitModel, x: Tensor) -> list[float]:
    """τ between scores that occur, at which a sixth, half and five sixths of the scores are passed."""
    scores = exitkit.collect(ee, [x]).scores()[:, :-1].flatten().double().sort().values.unique()
    middles = (scores[1:] + scores[:-1]) / 2 if len(scores) > 1 else scores
    return [float(middles[len(middles) * part // 6]) for part in (1, 3, 5)]


@pytest.mark.parametrize("method", METHODS)
def test_samples_leave_as_stored_predictions_say(models: dict[str, exitkit.MultiExitModel], method: str) -> None:
    ee, x = models[method], images(64)
    left: set[int] = set()
    for threshold in _thresholds(ee, x):
        prediction = exitkit.compile(ee, threshold)(x)
        exits, logits = _expected(ee, x, threshold)
        assert torch.equal(prediction.exit, exits)
        torch.testing.assert_close(prediction.logits.float(), logits, rtol=1e-5, atol=1e-5)
        left |= set(exits.tolist())
    assert len(left) > (1 if method == "mean" else 2)  # or nothing was tested


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_gives_what_one_sample_at_a_time_gives(models: dict[str, exitkit.MultiExitModel], method: str) -> None:
    ee, x = models[method], images(24)
    engine = exitkit.compile(ee, _thresholds(ee, x)[1])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    together, shuffled = engine(x), engine(x[order])
    for i in range(24):
        alone = engine(x[i : i + 1])
        assert alone.exit.item() == together.exit[i].item()
        torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone.score[0], together.score[i], rtol=1e-5, atol=1e-5)
    assert torch.equal(shuffled.exit, together.exit[order])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "additive"])
def test_when_nobody_leaves_the_answer_is_the_backbones_bit_for_bit(
    models: dict[str, exitkit.MultiExitModel], method: str
) -> None:
    ee = models[method]
    prediction = exitkit.compile(ee, 100.0)(images(7))
    with torch.no_grad():
        assert torch.equal(prediction.logits, ee.backbone(images(7)))
    assert prediction.exit.tolist() == [3] * 7


def test_when_everybody_leaves_at_once_nothing_else_runs(models: dict[str, exitkit.MultiExitModel]) -> None:
    ee = models["ztw"]
    engine = exitkit.compile(ee, -1.0)
    ran = []
    for index, stage in enumerate(engine.loop.program.steps):
        stage.run.register_forward_hook(lambda *_, index=index: ran.append(index))
    prediction = engine(images(5))
    assert ran == [0]
    assert prediction.exit.tolist() == [0] * 5
    with torch.no_grad():
        assert torch.equal(prediction.logits, ee(images(5)).logits[0])


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 9), quantiles=st.lists(st.floats(0, 1), min_size=3, max_size=3), seed=st.integers(0, 50))
def test_one_threshold_for_each_exit(
    models: dict[str, exitkit.MultiExitModel], batch: int, quantiles: list[float], seed: int
) -> None:
    ee = models["ztw"]
    x = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    scores = exitkit.collect(ee, [x]).scores()[:, :-1].double()
    thresholds = [float(scores[:, m].quantile(q)) + 1e-4 for m, q in enumerate(quantiles)]
    sure = scores > torch.tensor(thresholds, dtype=torch.float64)
    exits = torch.where(sure.any(1), sure.int().argmax(1), 3)
    prediction = exitkit.compile(ee, thresholds)(x)
    near = (scores - torch.tensor(thresholds)).abs().min(1).values < 1e-5  # rounding may decide there
    assert torch.equal(prediction.exit[~near], exits[~near])


def test_the_saved_threshold_is_the_default(models: dict[str, exitkit.MultiExitModel]) -> None:
    ee = models["sdn"]
    with pytest.raises(ExitkitError, match=r"threshold=None.*at_budget"):
        exitkit.compile(ee)
    ee.threshold = 0.4
    assert exitkit.compile(ee).thresholds == (0.4,) * 3
    ee.threshold = None


def test_the_engine_is_thread_safe(models: dict[str, exitkit.MultiExitModel]) -> None:
    ee = models["pbee"]
    engine = exitkit.compile(ee, 1.0)
    batches = [images(size) for size in range(1, 13)] * 3
    expected = [engine(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(engine, batches), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_empty_batch_has_an_empty_answer(models: dict[str, exitkit.MultiExitModel]) -> None:
    prediction = exitkit.compile(models["ztw"], 0.5)(images()[:0])
    assert prediction.logits.shape == (0, 3)
    assert len(prediction.exit) == len(prediction.score) == 0


def test_a_score_that_is_not_finite_never_lets_a_sample_leave(models: dict[str, exitkit.MultiExitModel]) -> None:
    x = images(4)
    x[2, 0, 3, 3] = float("nan")
    engine = exitkit.compile(models["sdn"], 0.0)
    prediction = engine(x)
    assert prediction.exit.tolist() == [0, 0, 3, 0]
    assert prediction.non_finite.tolist() == [False, False, True, False]
    assert [bool(engine(row).non_finite) for row in x.split(1)] == [False, False, True, False]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 1, 9, 9), r"shape \(2, 1, 9, 9\).*compiled for \(batch, 1, 8, 8\).*Resize"),
        (torch.randn(1, 8, 8), r"shape \(1, 8, 8\).*a dimension is missing"),
        (torch.randn(2, 1, 8, 8, dtype=torch.float64), r"torch\.float64, and the model takes torch\.float32"),
    ],
)
def test_inputs_of_another_kind(models: dict[str, exitkit.MultiExitModel], x: Tensor, message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        exitkit.compile(models["sdn"], 0.5)(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": [0.5, 0.5]}, r"threshold has 2 values.*each of the 3 exits"),
        ({"threshold": [0.5, "high", 0.5]}, r"threshold=\[0\.5, 'high', 0\.5\] must be a number"),
        ({"threshold": float("nan")}, r"threshold=nan must be a number"),
        ({"threshold": 0.5, "criterion": "confidense"}, r"criterion='confidense' is unknown.*'confidence'"),
    ],
)
def test_arguments_out_of_range(
    models: dict[str, exitkit.MultiExitModel], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExitkitError, match=message):
        exitkit.compile(models["sdn"], **arguments)


def test_a_backbone_alone_is_no_multi_exit_model() -> None:
    with pytest.raises(ExitkitError, match=r"model is TinyNet; compile takes what exitkit\.attach"):
        exitkit.compile(TinyNet(), 0.5)  # type: ignore[arg-type]


def _bert() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40, num_labels=3,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), _text(12, 20)


def _llama() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40, num_labels=3,
        initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config), _text(12, 20)


def _tnt() -> tuple[nn.Module, Tensor]:
    """Rows of pixels, several for each sample, travel beside the tokens."""
    timm = pytest.importorskip("timm")
    return timm.create_model("tnt_s_legacy_patch16_224", depth=3, num_classes=5), images(6, 3, 224, 224)


def _msdnet() -> tuple[nn.Module, Tensor]:
    return exitkit.models.msdnet(layers=6), images(12, 3, 32, 32)


def _text(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 99, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(0, batch, 2):
        mask[row, length - 2 - row // 2 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("build", [_bert, _llama, _tnt, _msdnet])
@pytest.mark.parametrize("head", ["1L", "tail"])
def test_whatever_travels_with_a_sample_leaves_with_it(build: Callable[[], tuple[nn.Module, Any]], head: str) -> None:
    torch.manual_seed(0)
    model, batch = build()
    if head == "tail" and build in (_tnt, _msdnet):
        pytest.skip("its last block leaves several activations, or maps of other sizes")
    ee = noisy(exitkit.attach(model.eval(), batch, every=1, head=head, method="ztw"))
    scores = exitkit.collect(ee, [batch]).scores()[:, :-1].double()
    thresholds = scores.quantile(0.6, dim=0)
    engine = exitkit.compile(ee, thresholds.tolist())
    with torch.no_grad():
        prediction, output = (engine(**batch), ee(**batch)) if isinstance(batch, dict) else (engine(batch), ee(batch))
    sure = scores > thresholds
    exits = torch.where(sure.any(1), sure.int().argmax(1), sure.shape[1])
    assert len(set(exits.tolist())) > 2
    clear = (scores - thresholds).abs().min(1).values > 1e-5  # elsewhere rounding may decide
    for i in clear.nonzero().flatten().tolist():
        assert prediction.exit[i] == exits[i]
        torch.testing.assert_close(prediction.logits[i], output.logits[exits[i]][i].float(), rtol=1e-4, atol=1e-5)


def test_texts_of_another_length(models: dict[str, exitkit.MultiExitModel]) -> None:
    torch.manual_seed(0)
    model, batch = _bert()
    ee = noisy(exitkit.attach(model.eval(), batch, every=1, method="sdn"))
    engine = exitkit.compile(ee, 2.0)
    longer = _text(3, 33)
    with torch.no_grad():
        assert torch.equal(engine(**longer).logits, model(**longer).logits)


class _FixedLength(nn.Module):
    """Learned positions for texts of 12 tokens and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.positions = nn.Parameter(torch.randn(1, 12, 8))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
        self.classify = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.classify(x.mean(1))
        return logits


def test_texts_of_a_length_that_the_model_fixes() -> None:
    ids = torch.randint(0, 20, (2, 12))
    engine = exitkit.compile(exitkit.attach(_FixedLength().eval(), {"input_ids": ids}, every=1, method="sdn"), 0.5)
    assert len(engine(input_ids=ids[:1]).exit) == 1
    with pytest.raises(ExitkitError, match=r"shape \(2, 7\); the engine was compiled for \(batch, 12\)"):
        engine(input_ids=ids[:, :7])


def test_a_batch_too_large_for_memory_is_answered_in_parts(models: dict[str, exitkit.MultiExitModel]) -> None:
    engine = exitkit.compile(models["ztw"], 0.5)
    expected = engine(images(11))

    def small(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = engine.loop.program.steps[0].run.register_forward_pre_hook(small)  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="out of memory on 11 samples; they are answered 5 at a time"):
        prediction = engine(images(11))
    handle.remove()
    assert torch.equal(prediction.exit, expected.exit)
    torch.testing.assert_close(prediction.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_memory_does_not_grow_over_ten_thousand_calls(models: dict[str, exitkit.MultiExitModel]) -> None:
    engine, x = exitkit.compile(models["ztw"], 0.5), images(2)
    for _ in range(500):
        engine(x)
    gc.collect()
    tensors, peak = _tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        engine(x)
    gc.collect()
    assert _tensors() <= tensors
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 4_000
    )  # KiB: less than one for every second call


def _tensors() -> int:
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


def test_the_heads_own_mode_is_left_alone(models: dict[str, exitkit.MultiExitModel]) -> None:
    ee = models["sdn"]
    ee.train()
    exitkit.compile(ee, 0.5)
    assert all(module.training for module in ee.classifiers.modules())
    ee.eval()


def _regressor() -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return noisy(exitkit.attach(TinyNet(num_classes=1).eval(), images(), method=exitkit.PBEE(times=2)))


def test_regression_leaves_after_small_changes_in_a_row() -> None:
    ee, x = _regressor(), images(64)
    outputs = exitkit.collect(ee, [x])
    scores = outputs.scores()
    threshold = float(scores[:, 2].median())
    prediction = exitkit.compile(ee, threshold)(x)
    assert prediction.exit.tolist() == outputs.exits_at(threshold).tolist()
    assert set(prediction.exit.tolist()) == {2, 3}
    assert not prediction.non_finite.any()  # the lowest finite score, twice, is finite
    for row, exit_ in enumerate(prediction.exit.tolist()):
        torch.testing.assert_close(prediction.logits[row, 0], outputs.predictions[row, exit_], rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ExitkitError, match=r"criterion='margin' is for classes, but the model has 1 output; use 'tolerance'"
    ):
        exitkit.compile(ee, 0.5, criterion="margin")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Exits follow the backbone's precision; the same samples leave, but where rounding moves a score past τ."""
    torch.manual_seed(0)
    ee, x = noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method="ztw")), images(64)
    scores = exitkit.collect(ee, [x]).scores()[:, :-1]
    thresholds = scores.quantile(0.6, dim=0)
    expected = exitkit.compile(ee, thresholds.tolist())(x)
    got = exitkit.compile(ee.to(dtype), thresholds.tolist())(x.to(dtype))
    same = got.exit == expected.exit
    assert same.float().mean() > 0.9
    assert len(set(expected.exit.tolist())) > 2
    gap = got.logits[same].softmax(-1).float() - expected.logits[same].softmax(-1)
    assert gap.abs().max() < 0.1


def test_channels_last() -> None:
    torch.manual_seed(0)
    ee, x = noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method="ztw")), images(64)
    thresholds = exitkit.collect(ee, [x]).scores()[:, :-1].quantile(0.6, dim=0).tolist()
    expected = exitkit.compile(ee, thresholds)(x)
    got = exitkit.compile(ee.to(memory_format=torch.channels_last), thresholds)(
        x.to(memory_format=torch.channels_last)
    )
    assert torch.equal(got.exit, expected.exit)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)


# one by one, however the engine came to be ---------------------------------------------------------------------------

TASKS: dict[str, tuple[Any, list[str]]] = {
    "classes": ("sdn", ["confidence", "entropy", "nats", "margin", "patience"]),
    "linked": ("ztw", ["confidence"]),
    "regression": ("pbee", ["tolerance", "tolerance-2"]),
}
WAYS = ["fresh", "at", "timed", "skipping", "pt2", "onnx.zip"]
CASES = [
    (way, task, criterion)
    for way in WAYS
    for task, (_, criteria) in TASKS.items()
    for criterion in criteria
    if way != "skipping" or (task == "classes" and criterion != "patience")  # exits that read one another stay
]
DIVISORS = (3.0, 0.5, 2.0, 1.0)


class _Layers(nn.Module):
    """Four layers on eight numbers, quick to export."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.classify = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.classify(x)
        return logits


@pytest.fixture(scope="module")
def attached() -> dict[str, exitkit.MultiExitModel]:
    torch.manual_seed(0)
    nets = {task: _Layers(1 if task == "regression" else 3).eval() for task in TASKS}
    return {
        task: noisy(exitkit.attach(nets[task], torch.randn(2, 8), every=1, head="1L", method=method))
        for task, (method, _) in TASKS.items()
    }


TIMED = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))


def _exit_1_is_slow(engine: exitkit.Engine) -> exitkit.Engine:
    """The engine as if steps had taken a second and heads no time, but for exit 1, which can never pay."""
    assert engine.measured is not None
    count = len(engine.measured.timings.sizes)
    timings = replace(
        engine.measured.timings,
        seconds=((1.0,) * count,) * 4,
        heads=tuple((seconds,) * count for seconds in (0.0, 1e6, 0.0, 0.0)),
        decisions=(0.0,) * 3,
    )
    return replace(engine, measured=replace(engine.measured, timings=timings))


def _left_out(
    ee: exitkit.MultiExitModel, taus: list[float], criterion: str, temperatures: tuple[float, ...] | None
) -> set[int]:
    """Exit 1, and those others at which none of the timed samples leaves."""
    outputs = exitkit.collect(ee, [TIMED])
    scores = (outputs if temperatures is None else outputs.calibrated(temperatures)).scores(criterion)[:, :-1].tolist()
    left = {next((m for m, tau in enumerate(taus) if row[m] > tau), 3) for row in scores}
    return {1} | {m for m in (0, 2) if m not in left}


@pytest.fixture(scope="module")
def engine_of(
    attached: dict[str, exitkit.MultiExitModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str, ExitPolicy], exitkit.Engine]:
    """An engine for a policy, made in one of :data:`WAYS`; packages and measurements are made once."""
    folder, kept = tmp_path_factory.mktemp("ways"), {}

    def made(task: str, criterion: str, way: str, policy: ExitPolicy) -> exitkit.Engine:
        ee, key = attached[task], (task, way, criterion, policy.temperatures)
        if way == "fresh":
            return exitkit.compile(ee, policy)
        if key not in kept:
            careful = policy.at(1e9)
            if way == "at":
                kept[key] = exitkit.compile(ee, careful)
            elif way in ("timed", "skipping"):
                kept[key] = exitkit.compile(ee, careful, samples=TIMED, skip_unprofitable=way == "skipping")
                kept[key] = _exit_1_is_slow(kept[key]) if way == "skipping" else kept[key]
            else:
                path = folder / f"{len(kept)}.{way}"
                exitkit.export(ee, path, careful)
                kept[key] = exitkit.load(path)
        return kept[key].at(policy)

    return made


def _same(one: exitkit.Prediction, other: exitkit.Prediction, rows: Tensor) -> None:
    assert torch.equal(one.exit[rows], other.exit[rows])
    assert torch.equal(one.non_finite, other.non_finite)
    torch.testing.assert_close(one.logits[rows], other.logits[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.score[rows], other.score[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("way", "task", "criterion"), CASES)
def test_batched_equals_one_by_one_and_what_stored_predictions_say(
    attached: dict[str, exitkit.MultiExitModel],
    engine_of: Callable[[str, str, str, ExitPolicy], exitkit.Engine],
    way: str,
    task: str,
    criterion: str,
) -> None:
    if way == "onnx.zip":
        pytest.importorskip("onnxruntime")
    divided = (None,) if task == "regression" else (DIVISORS,) if way in ("pt2", "onnx.zip") else (None, DIVISORS)

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(
        batch=st.integers(1, 9),
        quantiles=st.lists(st.floats(0, 1), min_size=3, max_size=3),
        seed=st.integers(0, 50),
        temperatures=st.sampled_from(divided),
    )
    def check(batch: int, quantiles: list[float], seed: int, temperatures: tuple[float, ...] | None) -> None:
        x = torch.randn(batch, 8, generator=torch.Generator().manual_seed(seed))
        outputs = exitkit.collect(attached[task], [x])
        outputs = outputs if temperatures is None else outputs.calibrated(temperatures)
        scores = outputs.scores(criterion)[:, :-1]
        taus = [float(scores[:, m].quantile(q)) + 1e-3 for m, q in enumerate(quantiles)]
        policy = ExitPolicy(tuple(taus), criterion, temperatures)
        engine = engine_of(task, criterion, way, policy)
        skipped = _left_out(attached[task], taus, criterion, temperatures) if way == "skipping" else set()
        limits = torch.tensor(
            [float("inf") if m in skipped else tau for m, tau in enumerate(taus)], dtype=torch.float64
        )
        sure = scores > limits
        exits = torch.where(sure.any(1), sure.int().argmax(1), 3)
        clear = (scores - limits).abs().min(1).values > 1e-4  # elsewhere rounding may decide
        together = engine(x)
        alone = [engine(row) for row in x.split(1)]
        assert torch.equal(together.exit[clear], exits[clear])
        _same(together, exitkit.Prediction(*(torch.cat(part) for part in zip(*alone, strict=True))), clear)
        mapped = list(engine.map(x.split(2), 3))
        _same(together, exitkit.Prediction(*(torch.cat(part) for part in zip(*mapped, strict=True))), clear)

    check()


# dtypes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ztw", "sdn", exitkit.SDN(ensemble="mean", ensemble_final=True)])
def test_answers_have_one_dtype_whoever_leaves_and_are_the_exits_own(method: Any) -> None:
    """An ensemble answers in float32, a backbone in bfloat16: its answers fit into float32 as they are."""
    torch.manual_seed(0)
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method=method)).bfloat16()
    x = images(16).bfloat16()
    wide = torch.bfloat16 if method == "sdn" else torch.float32
    with torch.no_grad():
        answers = ee(x).logits
        single = [ee(row).logits for row in x.split(1)]
    for exit_, own in enumerate(answers):
        engine = exitkit.compile(ee, [2.0] * exit_ + [-1.0] * (3 - exit_))
        for prediction, expected in (
            (engine(x), own),
            (next(iter(engine.map([x], 16))), own),
            (engine(x[:1]), single[0][exit_]),
        ):
            assert prediction.logits.dtype == wide
            assert torch.equal(prediction.logits, expected.to(wide))
            assert prediction.exit.tolist() == [exit_] * len(expected)
    taus = exitkit.collect(ee, [x]).scores()[:, :-1].quantile(0.6, dim=0).tolist()
    mixed = exitkit.compile(ee, taus)
    assert len(set(mixed(x).exit.tolist())) > 2
    assert {mixed(part).logits.dtype for part in (x, *x.split(1), x[:0])} == {wide}


@pytest.mark.parametrize("convert", [lambda ee: ee.double(), lambda ee: ee.bfloat16(), lambda ee: ee.half()])
@pytest.mark.parametrize("method", ["sdn", "ztw"])
def test_a_model_that_was_converted_is_compiled_again(method: str, convert: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    ee = exitkit.attach(TinyNet().eval(), images(), method=method)
    engine, x = exitkit.compile(ee, 0.5), images(3)
    expected = engine(x)
    timed = exitkit.compile(ee, 0.5, samples=x)
    convert(ee)
    message = "converted to another dtype or moved to another device after it was compiled.*compile it again"
    for use in (engine, timed, engine.at(0.9), lambda x: list(engine.map([x])), lambda x: engine(x[:1])):
        with pytest.raises(ArgumentError, match=message):
            use(x)
    assert exitkit.compile(ee, 0.5)(x.to(next(ee.parameters()).dtype)).exit.shape == (3,)
    ee.float()  # as it was, but for rounding: what was compiled before fits again
    torch.testing.assert_close(engine(x).logits, expected.logits, rtol=0.05, atol=0.05)


def test_other_errors_of_a_step_stay_what_they_are(models: dict[str, exitkit.MultiExitModel]) -> None:
    engine = exitkit.compile(models["sdn"], 0.5)

    def fail(*_: Any) -> None:
        raise RuntimeError("something else")

    handle = engine.loop.program.steps[0].run.register_forward_pre_hook(fail)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="something else"):
        engine(images(2))
    handle.remove()
