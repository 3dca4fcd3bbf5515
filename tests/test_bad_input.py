"""Bad input to ``attach`` and ``inspect``: one ExitkitError that names the argument, the value and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit import ExitkitError
from tests.toy import TinyNet

X = torch.randn(2, 1, 8, 8)


@pytest.fixture
def attach(tiny_net: TinyNet) -> Callable[..., exitkit.MultiExitModel]:
    def call(**arguments: Any) -> exitkit.MultiExitModel:
        return exitkit.attach(tiny_net, **{"example_inputs": X, **arguments})

    return call


class Wrapped(nn.Module):
    """A TinyNet whose logits go through ``change`` before they are returned."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = TinyNet()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


def test_the_error_is_a_value_error() -> None:
    assert issubclass(ExitkitError, ValueError)


# --- method, head -------------------------------------------------------------------------------------------------


def test_unknown_method(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"method='ztv' is unknown.*Did you mean 'ztw'.*'sdn', 'pbee', 'ztw'"):
        attach(method="ztv")


@pytest.mark.parametrize("method", [None, 3, exitkit.SDN, ["ztw"]])
def test_a_method_that_is_neither_name_nor_config(attach: Callable[..., Any], method: Any) -> None:
    with pytest.raises(ExitkitError, match=r"method=.* is unknown.*config such as exitkit\.ZTW\("):
        attach(method=method)


@pytest.mark.parametrize("head", ["3L", "2L-0", "2L-", "2L-1.5", "", None, 2])
def test_unknown_head(attach: Callable[..., Any], head: Any) -> None:
    with pytest.raises(ExitkitError, match=rf"head={head!r} is unknown.*'auto', 'conv'.*'1L'.*'2L-1024'"):
        attach(head=head)


def test_a_convolutional_head_on_a_vector() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ExitkitError, match=r"head='conv' needs feature maps.*vector"):
        exitkit.attach(model, torch.randn(2, 4), head="conv")


# --- placement ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, -1, 4, True, False, 2.0, "2"])
def test_every_out_of_range(attach: Callable[..., Any], every: Any) -> None:
    with pytest.raises(
        ExitkitError, match=rf"every={every!r} .*at least 1 and at most 3.*4 blocks.*exitkit\.inspect\(model\)"
    ):
        attach(every=every)


def test_too_few_blocks_for_any_exit() -> None:
    """Nobody wrote every=1, and "1 to 0" is no range."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ExitkitError, match="block") as error:
        exitkit.attach(model, torch.randn(2, 4))
    assert "every=1" not in str(error.value)
    assert "1 to 0" not in str(error.value)


def test_unknown_boundary(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"at='block\.1' is unknown.*Did you mean 'blocks\.1'.*exitkit\.inspect"):
        attach(at=["blocks.0", "block.1"])


@pytest.mark.parametrize("name", [None, "", ["blocks.0"]])
def test_a_boundary_that_is_no_name(attach: Callable[..., Any], name: Any) -> None:
    with pytest.raises(ExitkitError, match=rf"at={re.escape(repr(name))} is unknown.*'blocks\.0'.*exitkit\.inspect"):
        attach(at=[name])


def test_a_module_inside_a_block_is_no_boundary(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"at='blocks\.1\.conv1' is unknown"):
        attach(at=["blocks.1.conv1"])


def test_at_as_a_string(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"at='blocks\.1' must be a list.*at=\['blocks\.1'\]"):
        attach(at="blocks.1")


@pytest.mark.parametrize("at", [3, 1.5])
def test_at_that_is_no_list(attach: Callable[..., Any], at: Any) -> None:
    with pytest.raises(ExitkitError, match=rf"at={at!r}.*list"):
        attach(at=at)


def test_at_without_names(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"at=\[\].*at least one.*exitkit\.inspect"):
        attach(at=[])


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, 30, float("nan"), "0.5", None])
def test_at_cost_out_of_range(attach: Callable[..., Any], share: Any) -> None:
    with pytest.raises(ExitkitError, match=rf"at_cost.*{share!r}.*between 0 and 1"):
        attach(at_cost=[0.5, share])


@pytest.mark.parametrize("at_cost", [0.5, "0.5"])
def test_at_cost_that_is_no_list(attach: Callable[..., Any], at_cost: Any) -> None:
    with pytest.raises(ExitkitError, match=rf"at_cost={at_cost!r}.*list"):
        attach(at_cost=at_cost)


def test_at_cost_without_shares(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"at_cost=\[\].*at least one"):
        attach(at_cost=[])


def test_more_shares_than_blocks(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"at_cost has 4 shares.*3 blocks"):
        attach(at_cost=[0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("placement", ["dense", "", 3])
def test_unknown_placement(attach: Callable[..., Any], placement: Any) -> None:
    with pytest.raises(ExitkitError, match=rf"placement={placement!r} .*'dense-sparse'.*'sparse-dense'"):
        attach(placement=placement)


def test_placement_with_too_few_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ExitkitError, match=r"placement='dense-sparse' needs at least 3 blocks.*has 2.*every=1"):
        exitkit.attach(model, torch.randn(2, 4), placement="dense-sparse")


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 2, "at": ["blocks.0"]},
        {"at": ["blocks.0"], "at_cost": [0.5]},
        {"every": 1, "at_cost": [0.5], "placement": "dense-sparse"},
    ],
)
def test_several_placements_at_once(attach: Callable[..., Any], arguments: dict[str, Any]) -> None:
    with pytest.raises(ExitkitError, match=f"^{' and '.join(arguments)} were given together.*one of every, at"):
        attach(**arguments)


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [exitkit.attach, exitkit.inspect])
@pytest.mark.parametrize(
    ("model", "named"), [(TinyNet, "TinyNet"), (len, "len"), (None, "None"), ("resnet50", "'resnet50'")]
)
def test_not_a_module(function: Callable[..., Any], model: Any, named: str) -> None:
    with pytest.raises(ExitkitError, match=rf"model=.*{named}.*not a torch\.nn\.Module.*pass the model object"):
        function(model, X)


@pytest.mark.parametrize("function", [exitkit.attach, exitkit.inspect])
def test_an_integer_output(function: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"Wrapped returns.*int64.*floating point of shape \(B, C\)"):
        function(Wrapped(lambda logits: (logits * 9).long()), X)


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda logits: logits.argmax(1).float(), r"\(2,\)"),
        (lambda logits: logits[:, :, None], r"\(2, 3, 1\)"),
        (lambda logits: logits.mean(0, keepdim=True), r"\(1, 3\)"),
        (lambda logits: logits.sum(), r"\(\)"),
    ],
)
def test_an_output_of_another_shape(change: Callable[[Tensor], Tensor], shape: str) -> None:
    with pytest.raises(ExitkitError, match=rf"Wrapped returns.*shape {shape}.*batch of 2.*shape \(B, C\)"):
        exitkit.attach(Wrapped(change), X)


def test_a_dict_without_logits() -> None:
    with pytest.raises(ExitkitError, match=r"returns dict with keys \['scores'\], not logits.*\.logits"):
        exitkit.attach(Wrapped(lambda logits: {"scores": logits}), X)


@pytest.mark.parametrize("change", [lambda logits: None, lambda logits: "cat", lambda logits: ()])
def test_an_output_that_is_no_tensor(change: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ExitkitError, match=r"returns (NoneType|str|tuple).*not logits.*needs a classifier"):
        exitkit.attach(Wrapped(change), X)


def test_a_single_class() -> None:
    with pytest.raises(ExitkitError, match=r"TinyNet has 1 output, which is regression.*use 'sdn', 'pbee' or 'gpf'"):
        exitkit.attach(TinyNet(num_classes=1), X)


def test_a_multi_exit_model_gets_no_second_set_of_exits(tiny_ee: exitkit.MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match=r"MultiExitModel|exitkit\.detach"):
        exitkit.attach(tiny_ee, X)


@pytest.mark.parametrize("model", [nn.Linear(64, 3), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))])
def test_a_model_of_one_layer_has_no_boundary(model: nn.Module) -> None:
    """One layer has no two streams, and the message must not say so."""
    with pytest.raises(ExitkitError, match="no boundary") as error:
        exitkit.attach(model, X.flatten(1))
    assert "side by side" not in str(error.value)


def test_a_model_without_parameters() -> None:
    with pytest.raises(ExitkitError, match="Flatten has no boundary"):
        exitkit.attach(nn.Flatten(), X)


def test_two_streams_side_by_side() -> None:
    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))
            self.right = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))
            self.scales = nn.Parameter(torch.randn(2))
            self.linear = nn.Linear(128, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = x * self.scales[0], x * self.scales[1]
            for one, other in zip(self.left, self.right, strict=True):
                left, right = one(left) + right, other(right) + left
            logits: Tensor = self.linear(torch.cat([left, right], 1).flatten(1))
            return logits

    with pytest.raises(ExitkitError, match=r"Streams has no boundary.*several modules' outputs are kept"):
        exitkit.attach(Streams(), X)


class Scaled(nn.Module):
    """Takes a number beside its tensor, or what is in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Any = 1.0) -> Tensor:
        factor = scale["factor"] if isinstance(scale, dict) else scale
        return self.last(torch.relu(self.first(x) * factor))


def test_another_number_than_at_attach_is_refused() -> None:
    """The graph holds the number, and the engine answered as if it had been given that one."""
    model, x = Scaled().eval(), torch.randn(2, 4)
    plain = exitkit.compile(exitkit.attach(model, x, at=["first"]), 2.0)
    with torch.no_grad():
        assert torch.equal(plain(x).logits, model(x))
        halved = exitkit.compile(exitkit.attach(model, {"x": x, "scale": 0.5}, at=["first"]), 2.0)
        assert torch.equal(halved(x=x, scale=0.5).logits, model(x, 0.5))
    with pytest.raises(ExitkitError, match=r"argument 1 is 3\.0, and the model was attached without it.*attach again"):
        plain(x, 3.0)
    with pytest.raises(ExitkitError, match=r"argument 'scale' is 3\.0, and the model was attached with 0\.5"):
        halved(x=x, scale=3.0)


@pytest.mark.parametrize(
    "example", [(torch.ones(2, 4), {"factor": torch.ones(1, 4)}), ({"x": torch.ones(2, 4)},)], ids=["beside", "alone"]
)
def test_tensors_in_a_dict_are_refused(example: Any) -> None:
    """Those beside a tensor became constants of the graph, and others were ignored."""
    with pytest.raises(ExitkitError, match=r"is a dict of tensors.*wrap the model in a module"):
        exitkit.attach(Scaled(), example, at=["first"])


def test_one_number_for_each_sample_needs_a_dimension() -> None:
    class Flat(Scaled):
        def forward(self, x: Tensor, scale: Any = 1.0) -> Tensor:
            return super().forward(x)[:, 0]

    with pytest.raises(ExitkitError, match=r"shape \(2,\).*regression, whose output is \(B, 1\).*output\[:, None\]"):
        exitkit.attach(Flat(), torch.ones(2, 4))


def test_features_of_five_dimensions_have_no_head() -> None:
    block = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()]
    model = nn.Sequential(*block, nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ExitkitError, match=r"\(2, 2, 2, 2, 4\) per sample; heads read vectors, .*maps and volumes"):
        exitkit.attach(model, torch.randn(2, 2, 2, 2, 2, 4))


def test_a_model_without_memory() -> None:
    with pytest.raises(ExitkitError, match="meta"):
        exitkit.attach(TinyNet().to("meta"), X)


# --- the example --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [exitkit.attach, exitkit.inspect])
def test_no_inferable_example(function: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"example_inputs=None.*TinyNet.*pass example_inputs=torch\.randn\("):
        function(TinyNet())


@pytest.mark.parametrize("function", [exitkit.attach, exitkit.inspect])
def test_an_example_of_the_wrong_shape(function: Callable[..., Any]) -> None:
    with pytest.raises(
        ExitkitError, match=r"example_inputs of shapes .*\(2, 3, 8, 8\).*TinyNet.*1 channels.*Pass example_inputs"
    ):
        function(TinyNet(), X.expand(2, 3, 8, 8))


def test_an_example_of_the_wrong_dtype(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"example_inputs.*do not run through TinyNet.*Pass example_inputs"):
        attach(example_inputs=X.long())


def test_an_example_with_an_unknown_keyword(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"example_inputs.*'pixels'.*unexpected keyword argument 'pixels'"):
        attach(example_inputs={"pixels": X})


def test_an_empty_batch(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"example_inputs has shapes .*\(0, 1, 8, 8\).*non-zero batch size"):
        attach(example_inputs=X[:0])


def test_tensors_of_different_batch_sizes(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"\(2, 1, 8, 8\).*\(1, 1, 8, 8\).*needs the same"):
        attach(example_inputs=(X, X[:1]))


def test_an_example_without_batch_dimension(attach: Callable[..., Any]) -> None:
    with pytest.raises(ExitkitError, match=r"example_inputs has shapes .*\(\).*batch"):
        attach(example_inputs=torch.tensor(1.0))


@pytest.mark.parametrize("example", [5, "image", [1, 2], {}, (), {"x": None}])
def test_an_example_without_tensor(attach: Callable[..., Any], example: Any) -> None:
    with pytest.raises(ExitkitError, match=r"input.*tensor"):
        attach(example_inputs=example)


def test_a_call_unlike_the_example_is_refused_by_name(attach: Callable[..., Any]) -> None:
    ee = attach(example_inputs={"x": X})
    with pytest.raises(ExitkitError, match=r"attached with tensor inputs \['x'\].*called with \[0\]"):
        ee.example.spec.tensors(X)


def test_arrays_and_nan_as_example_inputs() -> None:
    with pytest.raises(ExitkitError, match=r"example_inputs of type ndarray.*give torch\.from_numpy\(x\)"):
        exitkit.attach(TinyNet(), X.numpy())
    with pytest.raises(ExitkitError, match=r"example_inputs: input 0 holds nothing but NaN"):
        exitkit.attach(TinyNet(), X * torch.nan)


@pytest.mark.parametrize("function", [exitkit.attach, exitkit.inspect])
def test_example_inputs_without_all_their_values(function: Callable[..., Any]) -> None:
    for example in (X.to_sparse(), X[:1].to_sparse()):
        with pytest.raises(exitkit.ArgumentError, match=r"^example_inputs: input 0 has the layout torch\.sparse_coo"):
            function(TinyNet(), example)
    with pytest.raises(exitkit.ArgumentError, match=r"^example_inputs: input 0 is on the meta device.*no values"):
        function(TinyNet(), X.to("meta"))


def test_a_state_dict_as_the_model() -> None:
    """What torch.load gives; its values do not belong into the message."""
    with pytest.raises(ExitkitError, match=r"^model is OrderedDict, perhaps a state dict.*load_state_dict") as error:
        exitkit.attach(TinyNet().state_dict(), X)  # type: ignore[arg-type]
    assert len(str(error.value)) < 250


def test_a_module_that_torch_export_made() -> None:
    exported = torch.export.export(TinyNet().eval(), (X,)).module()
    with pytest.raises(ExitkitError, match=r"GraphModule was made by torch\.export.*attach to the original model"):
        exitkit.attach(exported, X)


class Autocasting(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_a_forward_under_autocast() -> None:
    with pytest.raises(ExitkitError, match=r"has no boundary: its forward enters torch\.autocast.*leave that out"):
        exitkit.attach(Autocasting(), X)


def test_a_model_whose_forward_ends_in_a_softmax() -> None:
    model = Wrapped(lambda logits: logits.softmax(1))
    with pytest.warns(UserWarning, match=r"Wrapped returns probabilities.*softmax.*logits") as warned:
        exitkit.attach(model, X)
    assert [warning.filename for warning in warned] == [__file__]


# --- forwards that cannot be captured -----------------------------------------------------------------------------


class Branching(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


class ReadsValues(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * float(x.numpy().max()))


class FixedBatch(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(2, 1, 8, 8))


@pytest.mark.parametrize("function", [exitkit.attach, exitkit.inspect])
@pytest.mark.parametrize("model", [Branching(), ReadsValues()])
def test_a_forward_that_depends_on_values(function: Callable[..., Any], model: nn.Module) -> None:
    place = rf"test_bad_input\.py:{type(model).forward.__code__.co_firstlineno + 1}, in forward"
    said = rf"^{type(model).__name__} cannot be captured by torch\.export \(at .*{place}\): its path .*\. Use torch\.where.*: "
    with pytest.raises(ExitkitError, match=said + ".{10,120}$"):  # and in the end a little of what torch says
        function(model, X)


def test_a_forward_that_fixes_the_batch_size() -> None:
    with pytest.raises(ExitkitError, match=r"FixedBatch cannot be captured.*batch.*x\.shape\[0\]") as error:
        exitkit.attach(FixedBatch(), X)
    assert "TORCH_LOGS" not in str(error.value)  # a switch of torch's is no remedy


def test_samples_that_depend_on_one_another() -> None:
    """Statistics of the batch in eval mode: those who stay would have others once some have left."""
    net = TinyNet()
    for block in net.blocks:
        block.norm = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ExitkitError, match=r"TinyNet's logits of a sample depend on the others .*running statistics"):
        exitkit.attach(net.eval(), X * torch.tensor([0.2, 2.0])[:, None, None, None])


@pytest.mark.parametrize(
    "use", [lambda ee: ee(X.half()), lambda ee: exitkit.compile(ee, 0.5)], ids=["call", "compile"]
)
def test_a_backbone_that_was_converted_without_its_exits(attach: Callable[..., Any], use: Callable[..., Any]) -> None:
    ee = attach()
    ee.backbone.half()
    with pytest.raises(
        ExitkitError, match=r"backbone is torch\.float16 on cpu, and its exits are torch\.float32 on cpu; con"
    ):
        use(ee)


def test_detach_of_something_else(tiny_net: TinyNet) -> None:
    with pytest.raises(ExitkitError, match=r"detach takes what exitkit\.attach returned, not TinyNet"):
        exitkit.detach(tiny_net)


# --- afterwards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{"method": "ztv"}, {"every": 9}, {"at": ["nowhere"]}, {"head": "3L"}, {"example_inputs": X[:0]}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_a_model_that_got_an_error_is_unchanged_and_can_be_attached(
    tiny_net: TinyNet, attach: Callable[..., exitkit.MultiExitModel], arguments: dict[str, Any]
) -> None:
    weights = {key: value.clone() for key, value in tiny_net.state_dict().items()}
    tiny_net.train().blocks[1].eval()
    flags = [module.training for module in tiny_net.modules()]
    with pytest.raises(ExitkitError):
        attach(**arguments)
    assert [module.training for module in tiny_net.modules()] == flags
    assert all(torch.equal(value, weights[key]) for key, value in tiny_net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_net.modules())
    assert exitkit.detach(attach()) is tiny_net
