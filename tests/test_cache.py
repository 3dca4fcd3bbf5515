"""The feature cache: the same training without the backbone, and when there is none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import exitkit
from exitkit import ExitkitError, MultiExitModel, Trainer
from exitkit.training import Distillation, Loss
from exitkit.training.feature_cache.store import Writer, read_store
from tests.test_runs import launched
from tests.toy import TinyNet

Loader = DataLoader[Any]
EXAMPLE = torch.zeros(2, 1, 8, 8)


def fitted(ee: MultiExitModel, train: Loader, val: Loader | None = None, **options: Any) -> Trainer:
    trainer = Trainer(ee, **({"epochs": 3, "lr": 1e-2, "show_progress": False} | options))
    trainer.fit(train, val)
    return trainer


def images(samples: int = 48, side: int = 8, channels: int = 1, **options: Any) -> Loader:
    labels = torch.arange(samples) % 3
    pixels = torch.randn(samples, channels, side, side, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(pixels + labels.view(-1, 1, 1, 1) - 1, labels), **{"batch_size": 16} | options)


def texts(samples: int = 40, **options: Any) -> Loader:
    """Token ids of several lengths, padded within each batch."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (samples,), generator=generator).tolist()
    rows = [
        (torch.randint(1, 20, (length,), generator=generator), number % 2) for number, length in enumerate(lengths)
    ]

    def collate(batch: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([tokens for tokens, _ in batch], batch_first=True)
        labels = torch.tensor([label for _, label in batch])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    return DataLoader(rows, batch_size=8, collate_fn=collate, **options)  # type: ignore[arg-type]


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.models.VisionTransformer(
        img_size=16, patch_size=8, in_chans=1, num_classes=3, embed_dim=16, depth=4, num_heads=2
    )
    return model


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def attached(backbone: nn.Module, example: Any = None, **options: Any) -> MultiExitModel:
    torch.manual_seed(1)
    return exitkit.attach(backbone, example, **{"every": 1, "head": "1L"} | options)


def two(**options: Any) -> tuple[MultiExitModel, MultiExitModel]:
    """The same multi-exit model twice."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(attached(TinyNet(), EXAMPLE, **options))
    return models[0], models[1]


def close(one: MultiExitModel, other: MultiExitModel, within: float = 1e-5) -> bool:
    """Whether all weights, those of the ensemble's fit included, agree."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(a.float(), b.float(), rtol=within, atol=within) for a, b in pairs)


class Calls:
    """How many times a backbone was called."""

    def __init__(self, model: MultiExitModel) -> None:
        self.count = 0
        model.backbone.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


# the same training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sdn", "ztw", "gpf"])
@pytest.mark.parametrize("kind", ["vit", "bert", "maps"])
def test_the_result_is_that_without_the_cache(kind: str, method: str) -> None:
    make = {"vit": vit, "bert": bert, "maps": TinyNet}[kind]
    example = {"vit": torch.zeros(2, 1, 16, 16), "bert": None, "maps": EXAMPLE}[kind]
    runs = []
    for cache in (False, True):
        torch.manual_seed(0)
        ee = attached(make(), example, method=method)
        loaders = {
            "vit": lambda: images(side=16, shuffle=True),
            "bert": lambda: texts(shuffle=True),
            "maps": lambda: images(shuffle=True),
        }
        train, val = loaders[kind](), loaders[kind]()
        runs.append((ee, fitted(ee, train, val, cache=cache, accumulate=2).history))
    (plain, past), (cached, history) = runs
    assert close(plain, cached)
    for one, other in zip(past, history, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert other.val_loss == pytest.approx(one.val_loss, abs=1e-5)


@pytest.mark.parametrize("head", ["1L", "2L-4", "conv"])
def test_the_ensemble_is_fitted_on_features_of_half_the_precision(head: str) -> None:
    half, whole = two(method="ztw", head=head)
    before = [parameter.clone() for parameter in half.combiners.parameters()]
    history = fitted(half, images(shuffle=True), images(), cache=True, mixed_precision="bf16").history
    assert history[-1].loss == pytest.approx(
        fitted(whole, images(shuffle=True), images(), cache=True).history[-1].loss, rel=0.02
    )
    assert any(not torch.equal(a, b) for a, b in zip(before, half.combiners.parameters(), strict=True))


@pytest.mark.parametrize("head", ["conv", "strided", "2L-4", "tail"])
def test_every_head_can_be_cached(head: str) -> None:
    plain, cached = two(head=head)
    fitted(plain, images(shuffle=True))
    fitted(cached, images(shuffle=True), cache=True)
    assert close(plain, cached)


@pytest.mark.parametrize("form", ["generator", "sampler", "batch_sampler", "drop_last"])
def test_every_order_is_that_without_the_cache(form: str) -> None:
    def loader() -> Loader:
        generator = torch.Generator().manual_seed(5)
        data = images().dataset
        if form == "generator":
            return images(shuffle=True, generator=generator)
        if form == "drop_last":
            return images(40, shuffle=True, drop_last=True)
        sampler: Any = RandomSampler(data, replacement=True, generator=generator)  # type: ignore[arg-type]
        if form == "sampler":
            return DataLoader(data, batch_size=16, sampler=sampler)
        return DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(sampler, 16, False))

    plain, cached = two()
    fitted(plain, loader())
    fitted(cached, loader(), cache=True)
    assert close(plain, cached)


def test_labels_may_be_absent_and_soft() -> None:
    soft = torch.eye(3)[torch.arange(48) % 3] * 0.9 + 1 / 30
    pixels = images().dataset.tensors[0]  # type: ignore[attr-defined]
    for tensors, loss in (((pixels,), Loss(distillation=Distillation("last"))), ((pixels, soft), Loss())):
        plain, cached = two(method="ztw")
        for ee, cache in ((plain, False), (cached, True)):
            fitted(ee, DataLoader(TensorDataset(*tensors), batch_size=16, shuffle=True), loss=loss, cache=cache)
        assert close(plain, cached)


def test_the_backbone_runs_once_per_sample() -> None:
    ee = attached(TinyNet(), EXAMPLE, method="ztw")
    calls = Calls(ee)
    fitted(ee, images(48), images(32), cache=True, epochs=5)
    assert calls.count == 3 + 2


def shared(directory: str, batch: int) -> None:
    """A run from the cache, and how many samples went through the backbone of this process; the main one saves the weights."""
    rank = os.environ.get("RANK", "0")
    torch.manual_seed(1)
    ee = attached(TinyNet(), EXAMPLE)
    seen: list[int] = []
    ee.backbone.stem.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    train = images(batch_size=batch, shuffle=True, generator=torch.Generator())
    val = images(40, batch_size=batch)
    trainer = fitted(ee, train, val, cache=True, optimizer=torch.optim.SGD, output_dir=directory)
    records = [(record.loss, record.val_loss, record.accuracy) for record in trainer.history]
    torch.save({"seen": sum(seen), "weights": ee.state_dict(), "history": records}, f"{directory}/run-{rank}.pt")


def test_several_processes_share_what_one_of_them_wrote(tmp_path: Path) -> None:
    """Batches of 8 in each of two, against 16 in one. 40 validation samples leave a last batch for one of them alone."""
    result = launched(2, f"from tests.test_cache import shared; shared({str(tmp_path / 'two')!r}, 8)")
    assert result.returncode == 0, result.stdout[-3000:]
    shared(str(tmp_path / "one"), 16)
    one, two, other = (
        torch.load(tmp_path / name, weights_only=True) for name in ("one/run-0.pt", "two/run-0.pt", "two/run-1.pt")
    )
    assert (one["seen"], two["seen"], other["seen"]) == (48 + 40, 48 + 40, 0)
    for name, value in one["weights"].items():
        if not name.startswith("combiners."):
            torch.testing.assert_close(two["weights"][name], value, atol=1e-5, rtol=1e-4)
    for before, after in zip(one["history"], two["history"], strict=True):
        assert before == tuple(pytest.approx(part, abs=1e-4) for part in after)


def test_the_model_is_left_as_it_was() -> None:
    ee = attached(TinyNet(), EXAMPLE).train()
    ee.backbone.blocks[1].eval()  # type: ignore[index,union-attr]
    before = [module.training for module in ee.modules()]
    hooks = [len(module._forward_pre_hooks) for module in ee.modules()]
    fitted(ee, images(), cache=True)
    assert [module.training for module in ee.modules()] == before
    assert [len(module._forward_pre_hooks) for module in ee.modules()] == hooks


# the file ------------------------------------------------------------------------------------------------------------


def test_a_second_run_finds_the_features(tmp_path: Path) -> None:
    ee = attached(TinyNet(), EXAMPLE)
    fitted(ee, images(), cache=True, output_dir=tmp_path, resume="never")
    calls = Calls(ee)
    fitted(ee, images(shuffle=True), cache=True, output_dir=tmp_path, resume="never", lr=1e-3)
    assert calls.count == 0


@pytest.mark.parametrize(
    "change", ["inputs", "labels", "backbone", "one weight", "placement", "damaged", "cut", "foreign", "empty"]
)
def test_features_of_something_else_are_computed_again(change: str, tmp_path: Path) -> None:
    first = TinyNet()
    fitted(attached(first, EXAMPLE), images(), cache=True, output_dir=tmp_path)
    path = tmp_path / "features-train.safetensors"
    written = path.read_bytes()
    backbone, train, every = first, images(), 1
    pixels, labels = train.dataset.tensors  # type: ignore[attr-defined]
    if change == "inputs":
        pixels[7, 0, 3, 3] += 1e-3
    elif change == "labels":
        labels[7] = (labels[7] + 1) % 3
    elif change == "backbone":
        backbone = TinyNet()
    elif change == "one weight":  # of 576, a sparse edit
        first.blocks[1].conv1.weight.data.view(-1)[4] += 0.5  # type: ignore[union-attr,operator]
    elif change == "placement":
        every = 2
    else:
        middle = bytes([*written[:-100], written[-100] ^ 1, *written[-99:]])
        content = {"damaged": middle, "cut": written[:-50], "foreign": b"something else", "empty": b""}[change]
        path.write_bytes(content)
    ee, plain = (attached(backbone, EXAMPLE, every=every) for _ in range(2))
    calls = Calls(ee)
    fitted(ee, train, cache=True, output_dir=tmp_path, resume="never")
    assert calls.count == 3
    fitted(plain, train)
    assert close(ee, plain)


def test_a_killed_run_continues_from_the_cache(tmp_path: Path) -> None:
    whole, parts = two(method="ztw")
    fitted(whole, images(shuffle=True), cache=True, epochs=4)

    class Killed(Exception):  # noqa: N818 - it is no error
        pass

    count = 0

    def kill(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 8:  # in the third epoch of three steps
            raise Killed

    handle = parts.classifiers[0].linear.register_forward_hook(kill)
    with pytest.raises(Killed):
        fitted(parts, images(shuffle=True), cache=True, epochs=4, output_dir=tmp_path)
    handle.remove()
    (tmp_path / ".features-train-leftover.safetensors").touch()
    calls = Calls(parts)
    history = fitted(parts, images(shuffle=True), cache=True, epochs=4, output_dir=tmp_path).history
    assert len(history) == 4
    assert calls.count == 0
    assert close(whole, parts, within=0)
    assert not list(tmp_path.glob(".features-*"))


class Augmented(Dataset[Any]):
    """Images with noise that is drawn anew every time."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, number: int) -> Any:
        return torch.randn(1, 8, 8) + number % 3 - 1, number % 3


def test_the_seed_decides_the_augmentation_that_is_frozen(tmp_path: Path) -> None:
    """And a run that is taken up again finds its features, whatever was drawn before."""
    one, other = two(method="sdn")
    fitted(one, DataLoader(Augmented(), 16, shuffle=True), cache=True)
    torch.rand(7)
    fitted(other, DataLoader(Augmented(), 16, shuffle=True), cache=True, output_dir=tmp_path)
    assert close(one, other, within=0)
    calls = Calls(other)
    fitted(other, DataLoader(Augmented(), 16, shuffle=True), cache=True, output_dir=tmp_path, resume="never")
    assert calls.count == 0


def test_without_an_output_dir_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fitted(attached(TinyNet(), EXAMPLE), images(), cache=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", ["cache_gb", "disk"])
def test_what_is_too_large_is_said_and_not_cached(limit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if limit == "disk":
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    ee, plain = two()
    with pytest.warns(UserWarning, match="GB.*the backbone runs in every epoch"):
        fitted(ee, images(), cache=True, cache_gb=1e-6 if limit == "cache_gb" else 10, output_dir=tmp_path)
    fitted(plain, images())
    assert close(ee, plain, within=0)
    assert not list(tmp_path.glob("*features*"))


class Missing(Dataset[Any]):
    """One of the images is not where the list says."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, number: int) -> Any:
        if number == 40:
            raise FileNotFoundError(2, "No such file or directory", "img40.png")
        return torch.zeros(1, 8, 8), number % 3


@pytest.mark.parametrize("where", ["train", "val"])
def test_an_error_of_the_data_set_is_not_a_lack_of_room(where: str, tmp_path: Path) -> None:
    missing = DataLoader(Missing(), batch_size=16)
    loaders = (missing, images()) if where == "train" else (images(), missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it used to say that the backbone runs in every epoch
        with pytest.raises(FileNotFoundError, match="img40"):
            fitted(attached(TinyNet(), EXAMPLE), *loaders, cache=True, output_dir=tmp_path)
    assert not list(tmp_path.glob(f"*features-{where}*"))


def test_a_disk_that_fills_while_features_are_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Writer, start: int, batch: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "write", full)
    ee, plain = two()
    with pytest.warns(UserWarning, match="No space left on device.*the backbone runs in every epoch"):
        fitted(ee, images(), cache=True, output_dir=tmp_path)
    fitted(plain, images())
    assert close(ee, plain, within=0)
    assert not list(tmp_path.glob("*features*"))


def test_train_and_validation_share_the_limit(tmp_path: Path) -> None:
    fitted(attached(TinyNet(), EXAMPLE), images(), images(), cache=True, output_dir=tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("features-*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(attached(TinyNet(), EXAMPLE), images(), images(), cache=True, cache_gb=size / 1e9)
    with pytest.warns(UserWarning, match="cache_gb"):
        fitted(attached(TinyNet(), EXAMPLE), images(), images(), cache=True, cache_gb=0.9 * size / 1e9)


def test_maps_are_pooled_where_that_is_smaller(tmp_path: Path) -> None:
    """8 × 8 maps become two poolings to 4 × 4; those of 4 × 4 stay as they are."""
    for side, shape in ((8, (48, 2, 8, 4, 4)), (4, (48, 8, 4, 4))):
        ee = attached(TinyNet(), torch.zeros(2, 1, side, side))
        fitted(ee, images(side=side), cache=True, output_dir=tmp_path / str(side))
        path = tmp_path / str(side) / "features-train.safetensors"
        stored = load_file(path)
        assert tuple(stored["exit0"].shape) == shape
        assert tuple(stored["logits"].shape) == (48, 3)


def test_a_store_keeps_every_bit(tmp_path: Path) -> None:
    """Several dtypes, odd sizes, rows written in parts and out of order."""
    rows = {
        "half": torch.randn(5, 3).half(),
        "brain": torch.randn(5, 1, 3).bfloat16(),
        "labels": torch.arange(5),
        "float": torch.randn(5, 2, 3),
    }
    path = tmp_path / "store"
    path.touch()
    writer = Writer(path, {name: tensor[:2] for name, tensor in rows.items()}, 5)
    writer.write(2, {name: tensor[2:] for name, tensor in rows.items()})
    writer.write(0, {name: tensor[:2] for name, tensor in rows.items()})
    assert read_store(path, "k" * 64) is None
    writer.finish("k" * 64)
    stored = read_store(path, "k" * 64)
    assert stored is not None
    assert stored.keys() == rows.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in rows.items())
    assert read_store(path, "l" * 64) is None
    content = path.read_bytes()
    for bit in range(
        8 * content.index(b'"labels"'), 8 * content.index(b"}}")
    ):  # of what the header says of the tensors
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert read_store(path, "k" * 64) is None, bit


# what is refused -----------------------------------------------------------------------------------------------------


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((torch.randn(1, 8, 8), torch.tensor(i % 3)) for i in range(24))


@pytest.mark.parametrize(
    ("loader", "word"),
    [
        (lambda: DataLoader(Stream(), batch_size=8), "Stream"),
        (lambda: list(images()), "list"),
        (lambda: DataLoader(images().dataset, batch_size=None), "batch_size"),
    ],
)
def test_samples_without_numbers_are_refused(loader: Any, word: str) -> None:
    with pytest.raises(ExitkitError, match=rf"train_loader.*{word}"):
        fitted(attached(TinyNet(), EXAMPLE), loader(), cache=True)


def test_a_loader_that_leaves_samples_out_is_refused(tmp_path: Path) -> None:
    def without_first(batch: list[Any]) -> Any:
        return torch.utils.data.default_collate(batch[1:])

    with pytest.raises(ExitkitError, match="48 samples, but 45"):
        fitted(attached(TinyNet(), EXAMPLE), images(collate_fn=without_first), cache=True, output_dir=tmp_path)
    assert not list(tmp_path.glob("*features*"))


def test_heads_that_read_the_models_inputs_are_refused() -> None:
    """GPT-2's read-out looks for the last token in the ids."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=3, n_head=2, num_labels=2, pad_token_id=0)
    with pytest.raises(ExitkitError, match="head='tail'"):
        fitted(attached(transformers.GPT2ForSequenceClassification(config), head="tail"), texts(), cache=True)


def test_features_of_many_shapes_are_refused() -> None:
    """A copy of BERT's read-out reads all tokens, and texts have different numbers of them."""
    with pytest.raises(ExitkitError, match=r"\(8, 16\) per sample in the first batch and \(7, 16\)"):
        fitted(attached(bert(), head="tail"), texts(), cache=True)


@pytest.mark.parametrize("options", [{"regime": "mixed"}, {"loss": Loss(distillation=Distillation(TinyNet()))}])
def test_options_that_need_the_backbone_or_the_inputs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ExitkitError, match="cache=True"):
        Trainer(attached(TinyNet(), EXAMPLE), cache=True, **options)


def test_a_replaced_last_layer_is_refused() -> None:
    with pytest.raises(ExitkitError, match="replaced"):
        Trainer(attached(TinyNet(), EXAMPLE, num_classes=2), cache=True)


@pytest.mark.parametrize("value", [0, -1.0, "much", float("inf")])
def test_a_limit_out_of_range_is_refused(value: Any) -> None:
    with pytest.raises(ExitkitError, match="cache_gb"):
        Trainer(attached(TinyNet(), EXAMPLE), cache=True, cache_gb=value)
