"""What surgery does not take is refused by name: models in another form, forwards that the capture cannot see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit import ExitkitError
from tests.toy import Noise, TinyNet, images


class CallCount(nn.Module):
    """Depends on Python state: how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Faulty(TinyNet):
    """A fault after the block ``index``, inside a list of (block, fault) pairs."""

    def __init__(self, fault: nn.Module, index: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(block, fault) if i == index else block for i, block in enumerate(self.blocks))
        )


@pytest.mark.parametrize("fault", [Noise, CallCount])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_forward_the_capture_cannot_see_is_refused_by_name(fault: type[nn.Module], index: int) -> None:
    with pytest.raises(ExitkitError, match=rf"refused.*module 'blocks\.{index}.*(random|state)"):
        exitkit.attach(Faulty(fault(), index), images(), at=["blocks.0", "blocks.1", "blocks.2"])


@pytest.mark.parametrize("fault", [Noise, CallCount])
def test_a_fault_after_the_last_exit_is_refused_too(fault: type[nn.Module]) -> None:
    with pytest.raises(ExitkitError, match=r"refused.*logits.*(random|state)"):
        exitkit.attach(Faulty(fault(), 3), images())


def test_a_branch_on_the_batch_size_is_refused() -> None:
    class Branch(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[0] == 2 else -super().forward(x)

    with pytest.raises(ExitkitError, match=r"Branch.*batch"):
        exitkit.attach(Branch(), images())


class Outputs(TinyNet):
    """Returns what ``make`` makes of the logits."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.make(super().forward(x))


class OneRow(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.blocks(self.stem(x)).mean((2, 3)).reshape(1, 8))
        return logits


class NoBatch(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[None])[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y: (y, 2 * y), r"several outputs, of shapes \(2, 3\), \(2, 3\); wrap it"),
        (lambda y: (y, y[:, :2]), r"several outputs, of shapes \(2, 3\), \(2, 2\); wrap it"),
        (lambda y: {"boxes": y}, r"dict with keys \['boxes'\], not logits"),
        (lambda y: [{"boxes": y}], r"dict with keys \['boxes'\], not logits"),
        (lambda y: {"out": y[:, :, None, None]}, "not logits"),
        (lambda y: y[:, :, None, None], r"shape \(2, 3, 1, 1\).*need a classifier"),
        (lambda y: y.argmax(1), r"torch.int64 tensor of shape \(2,\).*need a classifier"),
    ],
)
def test_outputs_that_are_no_logits(make: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        exitkit.attach(Outputs(make), images())


@pytest.mark.parametrize(("model", "example"), [(OneRow(), images(1)), (NoBatch(), images(1)[0])])
def test_a_model_of_one_row_only(model: nn.Module, example: Tensor) -> None:
    with pytest.raises(ExitkitError, match=rf"{type(model).__name__} runs on one row.*not on 2.*any batch size"):
        exitkit.attach(model, example)


def _compiled_in_place() -> nn.Module:
    model = TinyNet()
    model.compile(backend="eager")
    return model


def _quantized() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    converted: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    return converted


FORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "DataParallel": (
        lambda: nn.DataParallel(TinyNet()),
        r"DataParallel is a wrapper.*model\.module.*wrap what attach",
    ),
    "torch.compile": (lambda: torch.compile(TinyNet()), r"is compiled; attach to the module inside it.*compile what"),  # type: ignore[dict-item,return-value]
    "compile()": (_compiled_in_place, r"compiled in place by model\.compile\(\).*compile what attach returns"),
    "TorchScript": (lambda: torch.jit.trace(TinyNet().eval(), images()), "TorchScript.*the original model"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3)), "lazy modules.*run it once"),
    "quantised": (_quantized, r"quantised modules \(1 is torch\.ao.*Linear\); attach to the floating-point model"),
    "integers": (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), "no boundary.*no floating-point parameter"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_models_in_a_form_that_cannot_be_cut(form: str) -> None:
    make, message = FORMS[form]
    for function in (exitkit.attach, exitkit.inspect):
        with pytest.raises(ExitkitError, match=message):
            function(make(), images())


def test_a_model_without_values_can_be_inspected_but_not_attached_to() -> None:
    with torch.device("meta"):
        model = TinyNet()
    assert (
        exitkit.inspect(model, images(), show=False).anatomy
        == exitkit.inspect(TinyNet(), images(), show=False).anatomy
    )
    with pytest.raises(ExitkitError, match=r"meta device.*load its weights.*exitkit\.inspect"):
        exitkit.attach(model, images())


def test_a_refused_forward_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class ReadsValues(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else 2 * x)

    with pytest.raises(ExitkitError, match=r"ReadsValues cannot be captured.*Use torch\.where"):
        exitkit.attach(ReadsValues(), images())
    assert capfd.readouterr() == ("", "")
