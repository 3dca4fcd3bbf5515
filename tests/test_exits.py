"""Exits against closed forms: pooling, links, ensembles, head geometry, presets, and what they cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import exitkit
from exitkit.exits import (
    AdditiveEnsemble,
    CascadeLink,
    GeometricEnsemble,
    InternalClassifier,
    MeanEnsemble,
    SDNPool,
    TokenPool,
)
from exitkit.exits.classifiers import HeadSpec, make_head
from exitkit.exits.feature import Feature
from tests.toy import TinyNet

ENSEMBLES = [GeometricEnsemble, AdditiveEnsemble]
Ensemble = GeometricEnsemble | AdditiveEnsemble
EXAMPLE = torch.zeros(2, 1, 8, 8)


def head(
    shape: tuple[int, ...],
    layout: str = "channels_first",
    spec: str = "auto",
    cascade: bool = False,
    **feature: object,
) -> InternalClassifier:
    return make_head(Feature(shape, layout, **feature), 5, HeadSpec.parse(spec), cascade)  # type: ignore[arg-type]


def first_conv(classifier: nn.Module) -> nn.Conv2d | None:
    return next((part for part in classifier.modules() if isinstance(part, nn.Conv2d)), None)


def linears(classifier: nn.Module) -> list[tuple[int, int]]:
    return [(part.in_features, part.out_features) for part in classifier.modules() if isinstance(part, nn.Linear)]


def randomised(ensemble: Ensemble, scale: float = 1.0) -> Ensemble:
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    return ensemble


# pooling -------------------------------------------------------------------------------------------------------------


def test_sdn_pool_is_gamma_average_plus_rest_maximum() -> None:
    maps, pool = torch.randn(2, 3, 8, 8), SDNPool()
    pool.gamma.data.fill_(0.3)
    windows = maps.view(2, 3, 4, 2, 4, 2)
    assert torch.allclose(pool(maps), 0.3 * windows.mean((3, 5)) + 0.7 * windows.amax((3, 5)), atol=1e-6)


@pytest.mark.parametrize(("size", "pooled"), [((2, 3), (2, 3)), ((3, 8), (3, 4)), ((1, 1), (1, 1)), ((7, 5), (4, 4))])
def test_sdn_pool_keeps_dimensions_smaller_than_four(size: tuple[int, int], pooled: tuple[int, int]) -> None:
    assert SDNPool()(torch.randn(2, 3, *size)).shape == (2, 3, *pooled)


def test_sdn_pool_leaves_maps_smaller_than_four_as_they_are() -> None:
    maps = torch.randn(2, 3, 2, 3)
    assert torch.allclose(SDNPool()(maps), maps)


def test_gamma_is_learned() -> None:
    maps, pool = torch.randn(2, 3, 8, 8), SDNPool()
    pool(maps).sum().backward()
    windows = maps.view(2, 3, 4, 2, 4, 2)
    assert torch.allclose(pool.gamma.grad, (windows.mean((3, 5)) - windows.amax((3, 5))).sum(), rtol=1e-4)


# token read-outs -----------------------------------------------------------------------------------------------------


def test_first_token() -> None:
    tokens = torch.randn(2, 5, 3)
    assert torch.equal(TokenPool("first")(tokens), tokens[:, 0])


def test_mean_leaves_out_skipped_tokens() -> None:
    tokens = torch.randn(2, 5, 3)
    assert torch.allclose(TokenPool("mean", skip=2)(tokens), (tokens[:, 2] + tokens[:, 3] + tokens[:, 4]) / 3)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_masked_mean_counts_only_what_the_mask_keeps(dtype: torch.dtype) -> None:
    tokens, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype)
    expected = torch.stack([(tokens[0, 0] + tokens[0, 1]) / 2, tokens[1, 0]])
    assert torch.allclose(TokenPool("masked_mean")(tokens, mask), expected)


def test_masked_mean_does_not_depend_on_padding() -> None:
    tokens, mask = torch.randn(1, 3, 4), torch.tensor([[1, 1, 0]])
    padded = tokens.clone()
    padded[:, 2] = 1e6
    pool = TokenPool("masked_mean")
    assert torch.equal(pool(tokens, mask), pool(padded, mask))


def test_masked_mean_of_nothing_is_no_nan() -> None:
    assert TokenPool("masked_mean")(torch.randn(1, 3, 4), torch.zeros(1, 3)).isfinite().all()


def test_masked_mean_without_a_mask_is_the_mean() -> None:
    tokens = torch.randn(2, 3, 4)
    assert torch.allclose(TokenPool("masked_mean")(tokens), tokens.mean(1))


def test_the_last_token_is_exported_for_batches_of_any_size() -> None:
    """As T5's stages need it."""
    pool, tokens, mask = TokenPool("last"), torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.long)
    mask[1, 2:] = 0
    any_batch = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(pool, (tokens, mask), dynamic_shapes=(any_batch, any_batch), strict=False).module()
    assert torch.equal(exported(tokens[:2], mask[:2]), torch.stack([tokens[0, 4], tokens[1, 1]]))


def test_token_head_passes_the_mask_on() -> None:
    classifier, tokens = head((3, 4), "tokens", readout="masked_mean"), torch.randn(2, 3, 4)
    masked = classifier(tokens, inputs=[torch.tensor([[1, 0, 0], [1, 0, 0]])])
    assert torch.allclose(masked, classifier.linear(tokens[:, 0]))


# cascade -------------------------------------------------------------------------------------------------------------


def test_link_is_layer_norm_of_previous_beside_the_vector() -> None:
    vector, previous = torch.randn(2, 4), torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 8.0]])
    mean, variance = torch.tensor([[2.0], [6.0]]), torch.tensor([[2 / 3], [2.0]])
    normed = (previous - mean) / (variance + 1e-5).sqrt()
    assert torch.allclose(CascadeLink(3)(vector, previous), torch.cat([vector, normed], 1), atol=1e-6)


def test_cascade_enters_before_the_last_linear_layer() -> None:
    classifier, maps, previous = head((4, 8, 8), spec="1L", cascade=True), torch.randn(2, 4, 8, 8), torch.randn(2, 5)
    vector = torch.cat([classifier.body(maps), nn.functional.layer_norm(previous, (5,))], 1)
    expected = vector @ classifier.linear.weight.T + classifier.linear.bias
    assert torch.allclose(classifier(maps, previous), expected, atol=1e-5)


def test_cascade_enters_after_the_hidden_layer() -> None:
    assert linears(head((4, 8, 8), spec="2L-7", cascade=True)) == [(4 * 16, 7), (7 + 5, 5)]


def test_without_detach_gradients_go_through_the_cascade(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method=exitkit.ZTW(detach=False))
    ee(torch.randn(4, 1, 8, 8)).heads[-2].sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in ee.classifiers[0].linear.parameters())  # type: ignore[union-attr]


def test_detach_without_a_cascade_is_refused() -> None:
    with pytest.raises(exitkit.ArgumentError, match=r"detach=False.*cascade=True"):
        exitkit.SDN(detach=False)


def test_no_gradient_of_a_later_exit_reaches_an_earlier_head(tiny_ee: exitkit.MultiExitModel) -> None:
    _, heads = tiny_ee.run_heads(torch.randn(4, 1, 8, 8))
    for later in (1, 2):
        earlier = [parameter for m in range(later) for parameter in tiny_ee.classifiers[m].parameters()]
        gradients = torch.autograd.grad(heads[later].sum(), earlier, allow_unused=True, retain_graph=True)
        assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_each_head_gets_its_own_gradient(tiny_ee: exitkit.MultiExitModel) -> None:
    _, heads = tiny_ee.run_heads(torch.randn(4, 1, 8, 8))
    for logits, classifier in zip(heads, tiny_ee.classifiers, strict=False):
        gradients = torch.autograd.grad(logits.square().sum(), list(classifier.parameters()), retain_graph=True)
        assert all(gradient.any() for gradient in gradients)


def test_a_later_exit_reads_the_logits_before_it(tiny_ee: exitkit.MultiExitModel) -> None:
    images = torch.randn(2, 1, 8, 8)
    _, before = tiny_ee.eval().run_heads(images)
    tiny_ee.classifiers[0].linear.bias.data += torch.tensor([3.0, 0.0, -1.0])
    _, after = tiny_ee.run_heads(images)
    assert not torch.allclose(before[1], after[1])
    assert torch.equal(before[-1], after[-1])


def test_the_first_exit_has_no_link(tiny_ee: exitkit.MultiExitModel) -> None:
    assert [classifier.link is not None for classifier in tiny_ee.classifiers] == [False, True, True]


def test_sdn_has_no_links(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn")
    assert all(classifier.link is None for classifier in ee.classifiers)


def test_a_linked_head_asks_for_the_previous_logits() -> None:
    with pytest.raises(exitkit.ExitkitError, match="previous"):
        head((4, 8, 8), cascade=True)(torch.randn(2, 4, 8, 8))


# ensembles -----------------------------------------------------------------------------------------------------------


def test_geometric_ensemble_is_equation_2() -> None:
    ensemble, p = randomised(GeometricEnsemble(3, 4)), torch.softmax(torch.randn(6, 3, 4), -1)
    w, b = ensemble.log_weights.exp(), ensemble.log_prior.exp()
    product = b * p[:, 0] ** w[0] * p[:, 1] ** w[1] * p[:, 2] ** w[2]
    assert torch.allclose(ensemble(p.log()).exp(), product / product.sum(-1, keepdim=True), atol=1e-6)


def test_additive_ensemble_is_equation_4() -> None:
    ensemble, p = randomised(AdditiveEnsemble(3, 4)), torch.softmax(torch.randn(6, 3, 4), -1)
    w, b = ensemble.log_weights.exp(), ensemble.log_prior.exp()
    mixture = w[0] * p[:, 0] + w[1] * p[:, 1] + w[2] * p[:, 2] + b
    assert torch.allclose(ensemble(p.log()).exp(), mixture / mixture.sum(-1, keepdim=True), atol=1e-6)


def test_mean_ensemble_is_the_mean_of_probabilities() -> None:
    p = torch.softmax(torch.randn(6, 3, 4), -1)
    p[0, 1] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert torch.allclose(MeanEnsemble(3, 4)(p.log()).exp(), p.mean(1), atol=1e-6)


def test_anytime_answers_are_running_means(tiny_net: TinyNet) -> None:
    method = exitkit.SDN(ensemble="mean", ensemble_final=True)
    out = exitkit.attach(tiny_net, EXAMPLE, every=1, method=method).eval()(torch.randn(4, 1, 8, 8))
    p = torch.stack([logits.softmax(-1) for logits in out.heads])
    for m, logits in enumerate(out.logits):
        assert torch.allclose(logits.exp(), p[: m + 1].mean(0), atol=1e-6)


def test_a_mean_needs_no_fit(tiny_net: TinyNet, loader: Callable[..., object]) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, every=2, method=exitkit.SDN(ensemble="mean"))
    exitkit.Trainer(ee, epochs=1, show_progress=False).fit(loader())  # type: ignore[arg-type]
    assert not list(ee.combiners.parameters())


def test_geometric_ensemble_starts_as_the_geometric_mean() -> None:
    p = torch.softmax(torch.randn(6, 2, 4), -1)
    mean = (p[:, 0] * p[:, 1]).sqrt()
    assert torch.allclose(GeometricEnsemble(2, 4)(p.log()).exp(), mean / mean.sum(-1, keepdim=True), atol=1e-6)


parameters = st.lists(st.floats(-40, 40), min_size=5, max_size=5)


@pytest.mark.parametrize("kind", ENSEMBLES)
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(values=parameters)
def test_weights_are_positive_for_any_parameters(kind: type[Ensemble], values: list[float]) -> None:
    """More belief of any member in a class never lowers the ensemble's."""
    ensemble = kind(2, 3).double()
    ensemble.log_weights.data = torch.tensor(values[:2], dtype=torch.float64)
    ensemble.log_prior.data = torch.tensor(values[2:], dtype=torch.float64)
    low = torch.tensor([[0.2, 0.3, 0.5], [0.3, 0.3, 0.4]], dtype=torch.float64)
    for member in range(2):
        high = low.clone()
        high[member] = torch.tensor([0.8, 0.1, 0.1])
        assert ensemble(high[None].log())[0, 0] >= ensemble(low[None].log())[0, 0]


@pytest.mark.parametrize("kind", ENSEMBLES)
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(values=parameters)
def test_ensembles_are_normalised_for_any_parameters(kind: type[Ensemble], values: list[float]) -> None:
    ensemble = kind(2, 3)
    ensemble.log_weights.data, ensemble.log_prior.data = torch.tensor(values[:2]), torch.tensor(values[2:])
    log_q = ensemble(torch.randn(4, 2, 3).log_softmax(-1))
    assert torch.allclose(log_q.logsumexp(-1), torch.zeros(4), atol=1e-5)


@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_no_nan_at_extreme_logits(kind: type[Ensemble], size: float) -> None:
    """Two members, each certain, of different classes."""
    ensemble = kind(2, 3)
    log_q = ensemble(torch.tensor([[[size, 0.0, -size], [-size, 0.0, size]]]).log_softmax(-1))
    log_q.amax().backward()
    assert not log_q.isnan().any()
    assert log_q.exp().sum().item() == pytest.approx(1)
    assert all(parameter.grad.isfinite().all() for parameter in ensemble.parameters())


def test_a_class_that_one_member_excludes_is_excluded_by_the_geometric_ensemble() -> None:
    log_p = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]]).log()
    q = GeometricEnsemble(2, 3)(log_p).exp()
    expected = torch.tensor([0.5 * 0.2, 0.5 * 0.3, 0]).sqrt()
    assert torch.allclose(q, expected / expected.sum())


def test_a_class_that_one_member_excludes_is_kept_by_the_additive_ensemble() -> None:
    log_p = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]]).log()
    ensemble = AdditiveEnsemble(2, 3)
    b = ensemble.log_prior.exp()[2]
    assert ensemble(log_p).exp()[0, 2].item() == pytest.approx(((0.25 + b) / (1 + 3 * b)).item())


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_an_excluded_class_leaves_the_gradient_finite(kind: type[Ensemble]) -> None:
    """A backbone that masks classes with -inf logits, under ensemble_final=True, can still be fitted."""
    ensemble = kind(2, 3)
    log_p = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]]).log()
    ensemble(log_p)[0, 0].backward()
    assert all(parameter.grad.isfinite().all() for parameter in ensemble.parameters())


def test_each_answer_combines_its_own_and_all_earlier_heads(tiny_ee: exitkit.MultiExitModel) -> None:
    for combiner in tiny_ee.combiners:
        randomised(combiner)
    out = tiny_ee.eval()(torch.randn(4, 1, 8, 8))
    p = [logits.softmax(-1) for logits in out.heads]
    for m, combiner in enumerate(tiny_ee.combiners):
        product = combiner.log_prior.exp() * math.prod(p[j] ** combiner.log_weights[j].exp() for j in range(m + 1))
        assert torch.allclose(out.logits[m].softmax(-1), product / product.sum(-1, keepdim=True), atol=1e-5)


def test_the_backbones_own_answer_is_left_alone(tiny_ee: exitkit.MultiExitModel) -> None:
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(tiny_ee.eval()(images).logits[-1], tiny_ee.backbone(images))


def test_ensemble_final_combines_the_backbones_answer_too(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method=exitkit.ZTW(ensemble="additive", ensemble_final=True))
    out = ee.eval()(torch.randn(4, 1, 8, 8))
    log_p = torch.stack([logits.log_softmax(-1) for logits in out.heads], 1)
    assert len(ee.combiners) == 4
    assert torch.equal(out.logits[-1], ee.combiners[3](log_p))


def test_sdn_answers_with_its_heads(tiny_net: TinyNet) -> None:
    out = exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn").eval()(torch.randn(4, 1, 8, 8))
    assert all(torch.equal(answer, logits) for answer, logits in zip(out.logits, out.heads, strict=True))


# head geometry (appendix A.1) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "shape", "stride", "width"),
    [
        (32, (16, 32, 32), 1, 16),
        (32, (64, 8, 8), 1, 64),
        (64, (64, 32, 32), 2, 64),
        (64, (64, 9, 9), 2, 64),
        (64, (64, 8, 8), 1, 64),
        (64, (64, 8, 16), 1, 64),
        (64, (64, 16, 8), 1, 64),
        (224, (256, 56, 56), 2, 64),
        (224, (2048, 7, 7), 1, 512),
        (None, (16, 32, 32), 1, 16),
    ],
)
def test_convolution_follows_the_input_size(side: int | None, shape: tuple[int, ...], stride: int, width: int) -> None:
    classifier = head(shape, spec="conv", image_side=side)
    conv = first_conv(classifier)
    assert conv is not None
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride) == (
        shape[0],
        width,
        (3, 3),
        (stride, stride),
    )
    assert classifier(torch.randn(2, *shape)).shape == (2, 5)


def test_conv_head_is_convolution_relu_pooling_linear() -> None:
    classifier, maps = head((4, 8, 8), spec="conv"), torch.randn(2, 4, 8, 8)
    conv = first_conv(classifier)
    assert conv is not None
    vector = SDNPool()(nn.functional.conv2d(maps, conv.weight, conv.bias, padding=1).relu()).flatten(1)
    assert torch.allclose(classifier(maps), classifier.linear(vector), atol=1e-5)


def test_conv_head_on_maps_smaller_than_four() -> None:
    classifier = head((8, 2, 3), spec="conv", cascade=True)
    assert linears(classifier) == [(8 * 6 + 5, 5)]
    assert classifier(torch.randn(2, 8, 2, 3), torch.randn(2, 5)).shape == (2, 5)


def test_one_layer_head_on_maps_has_no_convolution() -> None:
    classifier, maps = head((4, 8, 8), spec="1L"), torch.randn(2, 4, 8, 8)
    assert first_conv(classifier) is None
    assert torch.allclose(classifier(maps), classifier.linear(SDNPool()(maps).flatten(1)))


def test_two_layer_head_on_maps_has_the_hidden_width() -> None:
    classifier = head((4, 8, 8), spec="2L-1024")
    assert first_conv(classifier) is None
    assert linears(classifier) == [(4 * 16, 1024), (1024, 5)]


def test_two_layer_head_on_tokens_is_linear_relu_linear() -> None:
    classifier, tokens = head((3, 6), "tokens", spec="2L-1024", readout="first"), torch.randn(2, 3, 6)
    hidden, last = (part for part in classifier.modules() if isinstance(part, nn.Linear))
    assert linears(classifier) == [(6, 1024), (1024, 5)]
    assert torch.allclose(classifier(tokens), last(hidden(tokens[:, 0]).relu()))


def test_automatic_head_on_maps_has_a_hidden_layer() -> None:
    classifier = head((4, 8, 8))
    assert first_conv(classifier) is None
    assert linears(classifier) == [(4 * 16, 256), (256, 5)]


def test_automatic_head_on_tokens_is_one_linear_layer() -> None:
    assert linears(head((3, 6), "tokens")) == [(6, 5)]


def test_head_on_a_vector() -> None:
    classifier, vector = head((6,), "vector"), torch.randn(2, 6)
    assert torch.allclose(classifier(vector), classifier.linear(vector))


def test_separable_head_is_depthwise_then_pointwise_relu_pooling_linear() -> None:
    classifier, maps = head((4, 8, 8), spec="separable"), torch.randn(2, 4, 8, 8)
    depthwise, pointwise = (part for part in classifier.modules() if isinstance(part, nn.Conv2d))
    assert (depthwise.groups, pointwise.kernel_size) == (4, (1, 1))
    channels = [
        nn.functional.conv2d(maps[:, c : c + 1], depthwise.weight[c : c + 1], depthwise.bias[c : c + 1], padding=1)
        for c in range(4)
    ]
    mixed = nn.functional.conv2d(torch.cat(channels, 1), pointwise.weight, pointwise.bias).relu()
    assert torch.allclose(classifier(maps), classifier.linear(SDNPool()(mixed).flatten(1)), atol=1e-5)


def test_separable_head_has_the_geometry_of_the_convolution() -> None:
    classifier = head((64, 32, 32), spec="separable", image_side=224)
    convolutions = [part for part in classifier.modules() if isinstance(part, nn.Conv2d)]
    assert [(part.out_channels, part.stride) for part in convolutions] == [(64, (2, 2)), (16, (1, 1))]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 7), (3, 3), (4, 12)])
def test_strided_head_halves_size_and_channels(height: int, width: int) -> None:
    classifier, maps = head((6, height, width), spec="strided"), torch.randn(2, 6, height, width)
    conv = first_conv(classifier)
    assert conv is not None
    smaller = nn.functional.conv2d(maps.relu(), conv.weight, conv.bias, stride=2)
    assert smaller.shape[1] == 3
    assert torch.allclose(classifier(maps), classifier.linear(SDNPool()(smaller).flatten(1)), atol=1e-5)


def test_strided_head_needs_three_by_three() -> None:
    with pytest.raises(exitkit.ExitkitError, match=r"head='strided' needs maps of at least 3 × 3.*8 × 2.*'conv'"):
        head((6, 8, 2), spec="strided")


def test_a_strided_convolution_leaves_the_feature_as_it_was() -> None:
    maps = torch.randn(2, 6, 8, 8)
    before = maps.clone()
    head((6, 8, 8), spec="strided")(maps)
    assert torch.equal(maps, before)


@pytest.mark.parametrize("spec", ["auto", "conv", "1L", "2L-8", "separable", "strided"])
def test_channels_last_maps_give_what_channels_first_maps_give(spec: str) -> None:
    last, first = head((8, 6, 4), "channels_last", spec), head((4, 8, 6), "channels_first", spec)
    for own, other in zip(last.parameters(), first.parameters(), strict=True):
        own.data = other.data
    maps = torch.randn(2, 4, 8, 6)
    assert torch.allclose(last(maps.permute(0, 2, 3, 1)), first(maps), atol=1e-6)


@pytest.mark.parametrize("spec", ["linear", "3L", "2L", "2L-0", "2L--4", "", None, 2])
def test_unknown_heads_are_refused(spec: object) -> None:
    with pytest.raises(exitkit.ExitkitError, match=r"head=.*2L-1024"):
        HeadSpec.parse(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["tokens", "vector"])
@pytest.mark.parametrize("spec", ["conv", "separable", "strided"])
def test_a_convolution_needs_maps(layout: str, spec: str) -> None:
    with pytest.raises(exitkit.ExitkitError, match=f"'{spec}' needs feature maps"):
        head((3, 4), layout, spec=spec)


def test_attach_takes_the_head(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, every=2, method="sdn", head="2L-1024")
    assert linears(ee.classifiers) == [(8 * 16, 1024), (1024, 3)]


# methods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "parts"),
    [
        (exitkit.SDN, {"name": "sdn"}),
        (exitkit.PBEE, {"name": "pbee", "criterion": "patience"}),
        (exitkit.ZTW, {"name": "ztw", "cascade": True, "ensemble": "geometric"}),
        (exitkit.GPF, {"name": "gpf", "past_future": "paper", "criterion": "entropy"}),
        (exitkit.BranchyNet, {"name": "branchynet", "criterion": "entropy"}),
        (partial(exitkit.BranchyNet, nats=True), {"name": "branchynet", "criterion": "nats"}),
    ],
)
def test_presets_differ_from_independent_confident_exits_in_their_own_parts(
    preset: Callable[[], exitkit.Method], parts: dict[str, object]
) -> None:
    config = preset()
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    assert dataclasses.asdict(config) == defaults | parts


@pytest.mark.parametrize("name", ["sdn", "pbee", "ztw", "gpf", "branchynet"])
def test_attach_takes_preset_names(tiny_net: TinyNet, name: str) -> None:
    assert exitkit.attach(tiny_net, EXAMPLE, every=2, method=name).method.name == name


def test_attach_takes_a_config(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method=exitkit.ZTW(ensemble="additive", ensemble_final=True))
    assert [type(combiner) for combiner in ee.combiners] == [AdditiveEnsemble] * 4
    assert [classifier.link is not None for classifier in ee.classifiers] == [False, True, True]


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        exitkit.ZTW().cascade = False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble": "geometrc"}, "ensemble='geometrc'.*Did you mean 'geometric'"),
        ({"criterion": "confident"}, "criterion='confident'.*Did you mean 'confidence'"),
        ({"ensemble": "none", "ensemble_final": True}, "ensemble_final=True needs an ensemble"),
    ],
)
def test_impossible_configs_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(exitkit.ExitkitError, match=message):
        exitkit.ZTW(**options)


def test_unknown_methods_are_refused(tiny_net: TinyNet) -> None:
    with pytest.raises(exitkit.ExitkitError, match=r"method='zwt'.*Did you mean 'ztw'"):
        exitkit.attach(tiny_net, EXAMPLE, every=1, method="zwt")


# costs ---------------------------------------------------------------------------------------------------------------

STEM, BLOCK, LAST = 64 * 8 * 9, 2 * 64 * 8 * 8 * 9, 8 * 3  # MACs of TinyNet on 8x8 images
FLAT, WIDTH = 8 * 16, 256  # of what an IC's hidden layer and its last layer read


def macs(ee: exitkit.MultiExitModel) -> list[int]:
    return [exit_.macs for exit_ in ee.exits]


def test_cost_of_sdn_is_stages_and_heads_so_far(tiny_net: TinyNet) -> None:
    head_macs = FLAT * WIDTH + WIDTH * 3
    stages = [STEM + BLOCK * blocks for blocks in (1, 2, 3)]
    expected = [stage + (m + 1) * head_macs for m, stage in enumerate(stages)]
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn")
    assert macs(ee) == [*expected, STEM + 4 * BLOCK + LAST + 3 * head_macs]


def test_cost_of_ztw_adds_links_and_ensembles(tiny_ee: exitkit.MultiExitModel) -> None:
    """A product over members is m·C MACs; that of one member is elementwise, which does not count."""
    hidden, linked = FLAT * WIDTH, (WIDTH + 3) * 3
    heads = [hidden + WIDTH * 3, hidden + linked + 2 * 3, hidden + linked + 3 * 3]
    expected = [STEM + BLOCK * (m + 1) + sum(heads[: m + 1]) for m in range(3)]
    assert macs(tiny_ee) == [*expected, STEM + 4 * BLOCK + LAST + sum(heads)]


def test_the_final_ensemble_costs_too(tiny_net: TinyNet, tiny_ee: exitkit.MultiExitModel) -> None:
    final = exitkit.attach(tiny_net, EXAMPLE, every=1, method=exitkit.ZTW(ensemble_final=True))
    assert macs(final) == [*macs(tiny_ee)[:-1], macs(tiny_ee)[-1] + 4 * 3]


def test_cost_of_hidden_layers(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, every=2, method="sdn", head="2L-10")
    assert macs(ee)[0] == STEM + 2 * BLOCK + FLAT * 10 + 10 * 3


def test_fractions_are_of_the_unmodified_backbone(tiny_ee: exitkit.MultiExitModel) -> None:
    backbone = STEM + 4 * BLOCK + LAST
    assert [exit_.macs_fraction for exit_ in tiny_ee.exits] == [exit_.macs / backbone for exit_ in tiny_ee.exits]
    assert tiny_ee.exits[-1].macs_fraction > 1


def test_cost_does_not_depend_on_the_example_batch(tiny_net: TinyNet, tiny_ee: exitkit.MultiExitModel) -> None:
    larger = exitkit.attach(tiny_net, torch.zeros(5, 1, 8, 8), every=1, method="ztw")
    assert macs(larger) == macs(tiny_ee)


def test_exits_are_named_after_their_boundaries(tiny_ee: exitkit.MultiExitModel) -> None:
    assert [exit_.name for exit_ in tiny_ee.exits] == ["blocks.0", "blocks.1", "blocks.2", "backbone"]
