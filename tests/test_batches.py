"""What data loaders yield: understood where it can only mean one thing, and explained where not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from exitkit import ExitkitError
from tests.toy import TinyNet

X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3
RGB = torch.randn(6, 3, 8, 8)


@pytest.fixture(scope="module")
def ee() -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return exitkit.attach(TinyNet().eval(), torch.randn(2, 1, 8, 8), every=2, method="sdn")


def fit(ee: exitkit.MultiExitModel, batch: Any) -> None:
    exitkit.Trainer(ee, epochs=1, show_progress=False).fit([batch])


def validate(ee: exitkit.MultiExitModel, batch: Any) -> None:
    exitkit.Trainer(ee, epochs=1, show_progress=False).fit([(X, Y)], [batch])


def collect(ee: exitkit.MultiExitModel, batch: Any) -> None:
    exitkit.collect(ee, [batch])


@pytest.mark.parametrize(
    "batch",
    [
        {"x": X, "label": Y},
        {"image": X, "label": Y},
        {"pixel_values": X, "labels": Y},
        {"x": X, "label": Y, "idx": torch.arange(6), "sentence": ["a"] * 6, "weight": [0.5] * 6},
        {"img": X, "idx": torch.arange(6), "label": Y.tolist()},
        [X, Y],
    ],
    ids=str,
)
def test_batches_that_can_only_mean_one_thing_are_taken(ee: exitkit.MultiExitModel, batch: Any) -> None:
    expected = exitkit.collect(ee, [(X, Y)])
    outputs = exitkit.collect(ee, [batch])
    assert torch.equal(outputs.log_probs, expected.log_probs)
    assert outputs.labels is not None
    assert outputs.labels.tolist() == Y.tolist()
    engine = exitkit.compile(ee, 0.4)
    (answer,) = engine.map([batch])
    assert answer.exit.tolist() == engine(X).exit.tolist()


def test_training_on_such_batches_is_training_on_pairs(ee: exitkit.MultiExitModel) -> None:
    trained = []
    for batch in ((X, Y), {"image": X, "label": Y, "idx": torch.arange(6)}):
        torch.manual_seed(0)
        model = exitkit.attach(ee.backbone, X, every=2, method="sdn")
        fit(model, batch)
        trained.append(model.classifiers.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


@pytest.mark.parametrize("use", [fit, validate, collect])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X.byte(), Y), r"input 0 is torch\.uint8, and the model takes torch\.float32; scale and normalise pixels"),
        ((X.double(), Y), r"input 0 is torch\.float64.*call \.to\(torch\.float32\)"),
        ((X.permute(0, 2, 3, 1), Y), r"shape \(6, 8, 8, 1\).*takes \(batch, 1, 8, 8\); the channels come last"),
        ((RGB, Y), r"shape \(6, 3, 8, 8\).*give images of 1 channel$"),
        ((X[:, 0], Y), r"shape \(6, 8, 8\).*a dimension is missing.*x\[:, None\]"),
        (
            (X, Y, torch.arange(6)),
            r"holds 2 inputs before its labels.*attached with 1; yield \(inputs, labels\) alone",
        ),
        ([{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)], r"list of 6 samples, each a dict.*collate_fn="),
        (
            list(zip(X, Y, strict=True)),
            r"list of 6 samples, each a tuple.*collate_fn=torch\.utils\.data\.default_collate",
        ),
        (
            ({"lenghts": X, "x": X}, Y),
            r"holds \['lenghts'\], which the backbone does not take; name its inputs \['x'\]",
        ),
        ((["a.jpg"] * 6, Y), r"input 0 is a str; the model takes tensors"),
        ((X.numpy(), Y), r"inputs of type ndarray cannot be passed"),
        ((X, torch.nn.functional.one_hot(Y, 3)), r"shape \(6, 3\); expected class indices.*labels\.argmax\(1\)"),
        ((X, Y[:, None]), r"shape \(6, 1\); expected class indices of shape \(6,\): labels\.squeeze\(1\)"),
        ((X, Y.float()), r"dtype torch\.float32 .*expected class indices of shape \(6,\): labels\.long\(\)"),
        (
            (X.half(), Y),
            r"^input 0 is torch\.float16, and the model takes torch\.float32; call \.to\(torch\.float32\)$",
        ),
        ((X[:0], Y[:0]), r"loader: batch 0, counted from 0, holds no samples; leave such batches out"),
        (({"x": X[:0]}, Y[:0]), r"loader: batch 0, counted from 0, holds no samples; leave such batches out"),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)
def test_other_batches_are_explained(
    ee: exitkit.MultiExitModel, use: Callable[[exitkit.MultiExitModel, Any], None], batch: Any, message: str
) -> None:
    with pytest.raises(ExitkitError, match=message):
        use(ee, batch)


def test_inputs_with_another_number_of_dimensions_are_explained() -> None:
    """Linear layers take them, and would answer once for each position."""
    backbone = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    message = r"input 0 has shape \(6, 1, 8\), and the model takes \(batch, 8\); give as many dimensions, batch first"
    for method in ("sdn", "ztw"):
        ee = exitkit.attach(backbone.eval(), torch.randn(2, 8), every=1, method=method)
        for use in (fit, collect):
            with pytest.raises(ExitkitError, match=message):
                use(ee, (torch.randn(6, 1, 8), Y))


def test_inputs_that_are_not_finite_are_named_and_no_exit_is_blamed(ee: exitkit.MultiExitModel) -> None:
    broken = X.clone()
    broken[4, 0, 3, 3] = torch.nan
    broken[5, 0, 0, 0] = torch.inf
    message = r"input 0 holds NaN or infinite numbers in 2 of the 6 samples of a batch; repair such samples"
    with pytest.raises(ExitkitError, match=f"^{message}"):
        collect(ee, (broken, Y))
    loader = DataLoader(TensorDataset(broken, Y), 6)
    for cache in (False, True):
        with pytest.raises(exitkit.DivergedError, match=message) as error:
            exitkit.Trainer(ee, epochs=1, cache=cache, show_progress=False).fit(loader)
        assert error.value.exit is None
        with pytest.raises(exitkit.DivergedError, match=message):
            exitkit.Trainer(ee, epochs=1, cache=cache, show_progress=False).fit(
                DataLoader(TensorDataset(X, Y), 6), loader
            )
    assert all(tensor.isfinite().all() for tensor in ee.state_dict().values())


@pytest.mark.parametrize("use", [fit, validate])
def test_inputs_without_labels_are_explained(
    ee: exitkit.MultiExitModel, use: Callable[[exitkit.MultiExitModel, Any], None]
) -> None:
    with pytest.raises(ExitkitError, match=r"the loader yields no labels; yield \(inputs, labels\) or a dict"):
        use(ee, X)


def ask(ee: exitkit.MultiExitModel, batch: Any) -> None:
    ee(batch[0])


@pytest.mark.parametrize("use", [fit, validate, collect, ask])
def test_inputs_of_a_size_that_does_not_run_are_explained(use: Callable[[exitkit.MultiExitModel, Any], None]) -> None:
    backbone = torch.nn.Sequential(torch.nn.Flatten(), *(torch.nn.Linear(64, 64) for _ in range(3)))
    model = exitkit.attach(backbone.eval(), X, every=1, method="sdn")
    message = (
        r"input 0 has shape \(6, 1, 8, 7\), and the model was attached with \(batch, 1, 8, 8\); make it that size, or attach "
        "again with example_inputs of this one$"
    )
    with pytest.raises(ExitkitError, match=message):
        use(model, (X[..., :7], Y))


@pytest.mark.parametrize(
    "x", [X.byte(), X.permute(0, 2, 3, 1), X.numpy(), {"x": X}], ids=["dtype", "order", "array", "dict"]
)
def test_a_call_of_the_model_is_explained(ee: exitkit.MultiExitModel, x: Any) -> None:
    with pytest.raises(ExitkitError, match=r"^input 0 "):
        ee(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.numpy(), r"^input 0 is a numpy array.*give torch\.from_numpy\(x\)$"),
        ([1.0] * 64, r"^input 0 is a list of float; the model takes tensors"),
        ({"x": X}, r"^input 0 is a dict, whose tensors go by name; unpack it: model\(\*\*batch\)$"),
    ],
    ids=["array", "list", "dict"],
)
def test_the_engine_names_an_input_that_is_no_tensor(ee: exitkit.MultiExitModel, x: Any, message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        exitkit.compile(ee, 0.5)(x)


def test_the_engine_refuses_positions_beside_keywords(ee: exitkit.MultiExitModel) -> None:
    with pytest.raises(
        ExitkitError, match=r"tensor inputs \[0\], but was called with \[0, 'mask'\]; call it the same way"
    ):
        exitkit.compile(ee, 0.5)(X, mask=X)


META = r"on the meta device, where tensors have no values; give one that has$"
SPARSE = r"^input 0 has the layout torch\.sparse_coo, and the model takes dense tensors; give x\.to_dense\(\)$"


def answer(ee: exitkit.MultiExitModel, batch: Any) -> None:
    exitkit.compile(ee, 0.5)(batch[0])


@pytest.mark.parametrize("use", [fit, validate, collect, ask, answer])
@pytest.mark.parametrize(
    ("x", "message"),
    [(X.to_sparse(), SPARSE), (X.to_sparse().double(), SPARSE), (X.to("meta"), META)],
    ids=["sparse", "sparse double", "meta"],
)
def test_tensors_without_all_their_values_are_explained(
    ee: exitkit.MultiExitModel, use: Callable[[exitkit.MultiExitModel, Any], None], x: Tensor, message: str
) -> None:
    with pytest.raises(exitkit.ArgumentError, match=message):
        use(ee, (x, Y))


def test_sparse_tensors_are_refused_though_a_linear_layer_takes_them() -> None:
    backbone = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    model = exitkit.attach(backbone.eval(), torch.randn(2, 8), every=1, method="sdn")
    for use in (fit, collect, answer):
        with pytest.raises(exitkit.ArgumentError, match=SPARSE):
            use(model, (torch.eye(6, 8).to_sparse(), Y))


def test_short_memory_is_no_mistake_of_the_inputs(ee: exitkit.MultiExitModel) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("1 EiB")

    handle = ee.backbone.register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        collect(ee, (torch.randn(6, 1, 9, 9), Y))
    handle.remove()


def test_collecting_at_another_size_warns_once_that_costs_are_of_the_attached_one(ee: exitkit.MultiExitModel) -> None:
    with pytest.warns(
        UserWarning, match=r"shape \(6, 1, 9, 9\).*attached with \(batch, 1, 8, 8\): costs and budgets"
    ) as seen:
        outputs = exitkit.collect(ee, [(X, Y), *[(torch.randn(6, 1, 9, 9), Y)] * 3], show_progress=False)
    assert [one.filename for one in seen] == [__file__]
    assert outputs.macs.tolist() == exitkit.collect(ee, [(X, Y)]).macs.tolist()


def test_texts_are_of_any_length() -> None:
    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Embedding(10, 8)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
            self.last = torch.nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.words(x)
            for layer in self.layers:
                hidden = layer(hidden).relu()
            answer: Tensor = self.last(hidden.mean(1))
            return answer

    model = exitkit.attach(Words().eval(), torch.ones(2, 5, dtype=torch.long), every=1, method="sdn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(model, (torch.ones(6, 7, dtype=torch.long), Y))


def test_one_channel_for_a_backbone_of_three_is_repeated_by_the_user() -> None:
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3),
    )  # fmt: skip
    model = exitkit.attach(backbone.eval(), RGB, method="sdn")
    with pytest.raises(ExitkitError, match=r"repeat the one channel: x\.expand\(-1, 3, -1, -1\)"):
        collect(model, (X, Y))
    collect(model, (X.expand(-1, 3, -1, -1), Y))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.byte(), r"torch\.uint8.*scale and normalise pixels"),
        (X.permute(0, 2, 3, 1), r"the channels come last"),
        (RGB, r"give images of 1 channel"),
    ],
    ids=["uint8", "last", "three"],
)
def test_the_engine_says_the_same(ee: exitkit.MultiExitModel, x: Tensor, message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        exitkit.compile(ee, 0.5)(x)


def test_an_error_of_the_backbones_own_passes_as_it_is(ee: exitkit.MultiExitModel) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("out of paper")

    handle = ee.backbone.register_forward_pre_hook(refuse)
    try:
        with pytest.raises(RuntimeError, match="out of paper"):
            collect(ee, (X, Y))
    finally:
        handle.remove()


def test_a_mask_of_one_number_per_sample_stays_an_input() -> None:
    class Scaled(TinyNet):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(x if scale is None else x * scale.view(-1, 1, 1, 1))

    scale = torch.arange(1.0, 7.0)
    model = exitkit.attach(Scaled().eval(), {"x": X, "scale": scale}, every=2, method="sdn")
    outputs = exitkit.collect(model, [{"x": X, "scale": scale, "idx": torch.arange(6), "label": Y}])
    expected = model.backbone(X, scale).log_softmax(-1)
    assert torch.allclose(outputs.log_probs[:, -1], expected, atol=1e-6)
    assert torch.equal(exitkit.compile(model, 2.0)(x=X, scale=scale, idx=torch.arange(6)).exit, torch.full((6,), 1))
