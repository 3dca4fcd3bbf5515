"""Runs: steps and their options, several processes, runs that are ended and taken up again, and what is shown."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import exitkit
from exitkit import ExitkitError, MultiExitModel, Trainer
from exitkit.cli.recipes.schedule import by_name
from exitkit.training import Distillation, Loss, Phase
from exitkit.training.display import Display
from exitkit.training.distributed import make_accelerator, own_part, seed_everything
from exitkit.training.progress import Epoch
from tests.toy import TinyNet

Loaders = Callable[..., DataLoader[tuple[Tensor, ...]]]
EXAMPLE = torch.zeros(2, 1, 8, 8)
ROOT = Path(__file__).parents[1]


def trainer(ee: MultiExitModel, regime: Any = "mixed", **options: Any) -> Trainer:
    return Trainer(ee, regime, **({"epochs": 1, "lr": 1e-2, "show_progress": False} | options))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def identical(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.fixture
def ee(tiny_net: TinyNet) -> MultiExitModel:
    return exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn")


# steps ---------------------------------------------------------------------------------------------------------------


def test_two_accumulated_batches_are_one_of_twice_the_size(tiny_net: TinyNet, loader: Loaders) -> None:
    """With BatchNorm at rest: its statistics are of the small batches otherwise, as are those of heads that standardise."""
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn", head="conv")
    other = copy.deepcopy(ee)
    trainer(ee, "disjoint", optimizer=torch.optim.SGD, accumulate=2).fit(loader(64, 16))
    trainer(other, "disjoint", optimizer=torch.optim.SGD).fit(loader(64, 32))
    torch.testing.assert_close(ee.state_dict(), other.state_dict())


def test_what_is_left_over_is_a_step_too(tiny_net: TinyNet, loader: Loaders) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn", head="conv")
    other = copy.deepcopy(ee)
    trainer(ee, "disjoint", optimizer=torch.optim.SGD, accumulate=4).fit(loader(32, 16))
    trainer(other, "disjoint", optimizer=torch.optim.SGD).fit(loader(32, 32))
    torch.testing.assert_close(ee.state_dict(), other.state_dict())


def test_the_gradient_is_clipped(ee: MultiExitModel, loader: Loaders) -> None:
    """One step of SGD at rate 1 is as long as the gradient."""
    before = [parameter.clone() for parameter in ee.parameters()]
    trainer(ee, optimizer=torch.optim.SGD, lr=1.0, max_grad_norm=1e-2).fit(loader(16, 16))
    moved = torch.cat([(now - was).flatten() for now, was in zip(ee.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-2, rel=1e-3)


def test_the_optimiser_is_the_users(ee: MultiExitModel, loader: Loaders) -> None:
    """Against a loop by hand, with momentum and decay."""
    ee.backbone.dropout.p = 0.0
    by_hand = copy.deepcopy(ee).train()
    momentum = functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    trainer(ee, optimizer=momentum, weight_decay=1e-2, milestones=[]).fit(loader())
    optimizer = momentum(by_hand.parameters(), lr=1e-2, weight_decay=1e-2)
    for images, labels in loader():
        optimizer.zero_grad()
        sum(nn.functional.cross_entropy(logits, labels) for logits in by_hand(images).heads).backward()
        optimizer.step()
    torch.testing.assert_close(ee.state_dict(), by_hand.state_dict())


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP of version 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "parameters on the CPU"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ],
)
def test_a_model_divided_by_other_means_than_fsdp2_is_refused(
    ee: MultiExitModel, loader: Loaders, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], name: str
) -> None:
    """What ``accelerate launch`` sets; on CPU accelerate itself would go on without a word."""
    for variable, value in asked.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ExitkitError, match=f"{name}.*DDP.*--use_fsdp --fsdp_version 2"):
        trainer(ee).fit(loader(16))


def test_a_schedule_goes_on_after_every_step_of_the_optimiser(ee: MultiExitModel, loader: Loaders) -> None:
    """Over all steps of each phase, of several batches here."""
    given: list[int] = []
    rates: list[float] = []

    class Noted(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        given.append(steps)
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

    ready = trainer(ee, "separate", epochs=4, optimizer=Noted, schedule=schedule, accumulate=4, lr=1e-3)
    given.clear()
    ready.fit(loader(80, 16))
    assert given == [2] * 4
    assert rates == pytest.approx([1e-3, 5e-4] * 4)


def test_a_schedule_by_steps_is_taken_up_again(ee: MultiExitModel, loader: Loaders, tmp_path: Path) -> None:
    """A run that broke in its third epoch ends with the weights of one that did not."""
    other, batches, epochs = copy.deepcopy(ee), loader(), iter(range(3))

    class Breaking:
        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Iterator[Any]:
            if next(epochs) == 2:
                raise RuntimeError("broken")
            return iter(batches)

    schedule = functools.partial(by_name, name="restarts", warmup=0.25, cycles=2)
    options = {"epochs": 4, "schedule": schedule, "output_dir": tmp_path}
    with pytest.raises(RuntimeError, match="broken"):
        trainer(ee, **options).fit(Breaking())
    trainer(ee, **options).fit(batches)
    trainer(other, **(options | {"output_dir": None})).fit(batches)
    assert identical(ee, other)


class Stream(IterableDataset[int]):
    """Samples that come one after another, nobody knows how many."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_a_schedule_that_is_none_is_refused(ee: MultiExitModel, loader: Loaders) -> None:
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    with pytest.raises(ExitkitError, match="both set"):
        trainer(ee, schedule=cosine, milestones=[1])
    with pytest.raises(ExitkitError, match="gives int, not a schedule"):
        trainer(ee, schedule=lambda optimizer, steps: steps)
    with pytest.raises(
        ExitkitError, match=r"cannot be called with an optimiser and a number of steps \(You must define"
    ):
        trainer(ee, schedule=torch.optim.lr_scheduler.OneCycleLR)
    with pytest.raises(ExitkitError, match="gives str, not a schedule"):
        trainer(ee, schedule="cosine")
    with pytest.raises(ExitkitError, match="no length"):
        trainer(ee, schedule=cosine).fit(DataLoader(Stream(), batch_size=8))


def test_the_compiled_training_view_is_the_training_view(
    ee: MultiExitModel, loader: Loaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through dynamo, without the compiler behind it, which takes half a minute."""
    frames: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        frames.append(1)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile_(module, backend=count))
    ee.backbone.dropout.p = 0.0
    other = copy.deepcopy(ee)
    trainer(ee, compile=True).fit(loader(32))
    trainer(other).fit(loader(32))
    assert frames
    torch.testing.assert_close(ee.state_dict(), other.state_dict())


def test_channels_last(ee: MultiExitModel, loader: Loaders) -> None:
    other = copy.deepcopy(ee)
    seen: set[bool] = set()
    ee.backbone.blocks[0].register_forward_pre_hook(
        lambda module, args: seen.add(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    trainer(ee, "disjoint", channels_last=True, optimizer=torch.optim.SGD).fit(loader(32), loader(32))
    assert seen == {True}
    assert ee.backbone.blocks[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    trainer(other, "disjoint", optimizer=torch.optim.SGD).fit(loader(32))
    torch.testing.assert_close(ee.state_dict(), other.state_dict())


def small_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)  # type: ignore[no-any-return]


def test_gradient_checkpointing_changes_no_gradient() -> None:
    """Exits read features inside the recomputed blocks."""
    ids = torch.randint(1, 50, (8, 6))
    ee = exitkit.attach(small_bert(), {"input_ids": ids}, every=1, method="sdn")
    other = copy.deepcopy(ee)
    batches = [{"input_ids": ids, "labels": torch.arange(8) % 3}]
    calls: dict[MultiExitModel, int] = {ee: 0, other: 0}
    for model in calls:
        attention = model.backbone.bert.encoder.layer[1].attention
        attention.register_forward_hook(lambda *_, model=model: calls.update({model: calls[model] + 1}))
    trainer(ee, gradient_checkpointing=True, optimizer=torch.optim.SGD, lr=1.0).fit(batches)
    trainer(other, optimizer=torch.optim.SGD, lr=1.0).fit(batches)
    torch.testing.assert_close(ee.state_dict(), other.state_dict())
    assert calls[ee] == calls[other] + 1  # once more in the backward
    assert not any(getattr(module, "gradient_checkpointing", False) for module in ee.backbone.modules())


def test_gradient_checkpointing_that_a_model_cannot_is_refused(ee: MultiExitModel, loader: Loaders) -> None:
    with pytest.raises(ExitkitError, match=r"TinyNet has no gradient_checkpointing_enable\(\)"):
        trainer(ee, gradient_checkpointing=True).fit(loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate=0 must be a whole number at least 1"),
        ({"max_grad_norm": 0}, "max_grad_norm=0 must be a number greater than 0"),
        ({"backbone_lr": -1}, "backbone_lr=-1 must be a number greater than 0"),
        ({"backbone_lr": "fast"}, "backbone_lr='fast' must be a number"),
        ({"optimizer": "adamw"}, r"optimizer= is a str; give a function that makes one, such as torch\.optim\.AdamW"),
        ({"milestones": "15"}, "milestones='15' must be a list of epochs"),
        ({"milestones": [0]}, "milestones=0 must be a whole number at least 1"),
        ({"optimizer": lambda groups: groups}, "returned list; give a function from parameter groups"),
    ],
)
def test_bad_options_are_refused(ee: MultiExitModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        trainer(ee, **options)


def test_milestones_that_never_come_are_said(ee: MultiExitModel) -> None:
    with pytest.warns(UserWarning, match=r"milestones \[15, 40\] never come: no phase has more than 10 epochs"):
        trainer(ee, epochs=10, milestones=[5, 15, 40])
    with pytest.warns(UserWarning, match=r"milestones \[6\] never come: no phase has more than 5 epochs"):
        trainer(ee, [Phase((0,)), Phase((0, 1))], epochs=10, milestones=[6])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(ee, epochs=10, milestones=[5, 10])
        trainer(ee, epochs=10, milestones=[])


def test_numbers_of_numpy_are_numbers_in_checkpoints_too(ee: MultiExitModel, loader: Loaders, tmp_path: Path) -> None:
    """A checkpoint holds Python's own numbers alone: those of numpy's cannot be loaded without unpickling code."""
    distillation = Distillation(
        temperature=np.float32(2), confidence_limit=np.float32(0.35), multiplier=np.float32(1.1)
    )
    options = {"epochs": np.int64(2), "lr": np.float32(0.01), "seed": np.int64(3), "milestones": [np.int64(1)]}
    options |= {"loss": Loss(label_smoothing=np.float32(0.1), distillation=distillation), "patience": np.int64(2)}
    histories = [trainer(ee, "disjoint", output_dir=tmp_path, **options).fit(loader(32), loader(16)) for _ in range(2)]
    assert histories[0] == histories[1]
    assert checkpoint(tmp_path)["settings"]["lr"] == pytest.approx(0.01)


def test_a_run_directory_that_is_a_file_is_refused(tmp_path: Path, ee: MultiExitModel, loader: Loaders) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExitkitError, match="file' is a file; give a folder"):
        trainer(ee, output_dir=tmp_path / "file").fit(loader(16))


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path: Path, ee: MultiExitModel, loader: Loaders) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ExitkitError, match=r"output_dir=.*file/run' cannot be written: .*; give one where you may write"
    ):
        trainer(ee, output_dir=tmp_path / "file" / "run").fit(loader(16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is for GPUs")
def test_a_precision_that_the_device_has_not_is_refused() -> None:
    with pytest.raises(ExitkitError, match=r"mixed_precision='fp16' has no effect .*\(cpu\); use 'bf16'"):
        make_accelerator("fp16")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iter([1]), "val_loader is list_iterator, which is used up after one pass"),
        (lambda: (batch for batch in [1]), "val_loader is generator, which is used up after one pass"),
        (lambda: TensorDataset(torch.zeros(2)), "val_loader is TensorDataset, which yields no batches"),
        (lambda: None, "val_loader is NoneType, which yields no batches"),
        (list, "val_loader is empty: it yields no batch"),
    ],
)
def test_loaders_that_cannot_be_read_every_epoch_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        own_part(SimpleNamespace(num_processes=1), make(), "val_loader")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [50_000, 20_261_121, 2**40])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    drawn = []
    for _ in range(2):
        seed_everything([], seed)
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    seed_everything([], seed, epoch=1)
    assert drawn[0] == drawn[1]
    assert torch.rand(1).item() != drawn[0][0]


def test_a_bad_loss_names_step_exit_and_rates(ee: MultiExitModel, loader: Loaders) -> None:
    broken = torch.full((16, 1, 8, 8), 3e38), torch.zeros(16).long()
    with pytest.raises(ExitkitError, match=r"loss of exit 0 is nan in epoch 1, step 3, at lr=0\.01 and 0\.001; lower"):
        trainer(ee, backbone_lr=1e-3).fit([*loader(32, 16), broken])
    assert all(value.isfinite().all() for value in ee.parameters())


# several processes ---------------------------------------------------------------------------------------------------


class PlainNet(nn.Module):
    """Without BatchNorm and dropout, whose work depends on how a batch is divided."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)))
        self.linear = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.blocks(self.stem(x)).mean((2, 3)))
        return out


DIVIDED: dict[str, dict[str, Any]] = {
    "disjoint": {"regime": "disjoint", "loss": Loss(distillation=Distillation(confidence_limit=0.35))},
    "mixed": {"regime": "mixed", "accumulate": 2, "max_grad_norm": 1.0, "patience": 3},
    "alternating": {"regime": "alternating", "loss": Loss(gradient_equilibrium=True)},
    "branch-wise": {"regime": "branch-wise", "epochs": 4},
}


def divided(directory: str, batch: int, processes: int) -> None:
    """Every run of DIVIDED in this process, or its part of it; the main process saves the weights."""
    torch.manual_seed(0)
    images, labels = torch.randn(100, 1, 8, 8), torch.arange(100) % 3
    for name, options in DIVIDED.items():
        torch.manual_seed(1)
        ee = exitkit.attach(PlainNet(), EXAMPLE, at=["blocks.0", "blocks.1"], method="ztw")
        data = TensorDataset(images[:96] + labels[:96].view(-1, 1, 1, 1), labels[:96])
        train = DataLoader(data, batch, shuffle=True, generator=torch.Generator())
        val = DataLoader(TensorDataset(images[:50], labels[:50]), batch)
        settings = {"epochs": 2, "lr": 1e-2, "optimizer": torch.optim.SGD, **options}
        history = Trainer(ee, **settings, show_progress=False, output_dir=f"{directory}/{name}").fit(train, val)
        if int(os.environ.get("RANK", 0)) == 0:
            records = [(record.loss, record.accuracy) for record in history]
            with torch.no_grad():
                answers = torch.stack([logits.softmax(-1) for logits in ee.eval()(data.tensors[0]).logits])
            saved = {"weights": ee.state_dict(), "history": records, "answers": answers}
            torch.save(saved, f"{directory}/{name}.pt")


def launched(processes: int, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """As torchrun would: a process per rank, on the CPU with gloo."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    common = {"PYTHONPATH": path, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [child.communicate(timeout=300)[0] for child in children]
    status = max(abs(child.returncode) for child in children)
    return subprocess.CompletedProcess([], status, "\n".join(outputs))


def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    """Batches of 8 in each of two, against 16 in one: to 1e-5, as sums are added in another order.

    Ensembles, annealed temperatures, accumulated steps, validation and checkpoints included.
    """
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    code = f"from tests.test_runs import divided; divided({str(tmp_path / 'two')!r}, 8, 2)"
    result = launched(2, code)
    assert result.returncode == 0, result.stdout[-3000:]
    divided(str(tmp_path / "one"), 16, 1)
    for name in DIVIDED:
        one, two = (torch.load(tmp_path / part / f"{name}.pt", weights_only=True) for part in ("one", "two"))
        heads = {key for key in one["weights"] if not key.startswith("combiners.")}
        for key in heads:
            torch.testing.assert_close(
                two["weights"][key], one["weights"][key], msg=f"{name} {key}", atol=1e-5, rtol=1e-4
            )
        # L-BFGS stops a little earlier or later along a flat valley: weights differ that answer the training set alike
        torch.testing.assert_close(two["answers"], one["answers"], msg=f"{name}: ensembles", atol=1e-2, rtol=0)
        for (loss, accuracy), (other_loss, other_accuracy) in zip(one["history"], two["history"], strict=True):
            assert other_loss == pytest.approx(loss, abs=1e-4)
            assert other_accuracy == pytest.approx(accuracy, abs=0.021)  # a sample of 50 may lie on the border


@pytest.mark.parametrize(
    ("before", "told"), [("", "2 processes, this one has 8 of 16 samples"), ("P()", "would train alone")]
)
def test_torchrun_without_a_gpu_is_told_of_its_processes_too(before: str, told: str) -> None:
    """accelerate itself lets each train alone on all samples there, unless it is told to use the CPU."""
    code = f"""if True:
        from accelerate import PartialState as P
        from torch.utils.data import DataLoader
        from exitkit.training.distributed import make_accelerator, own_part
        {before}
        accelerator = make_accelerator("no")
        own = sum(len(batch) for batch in own_part(accelerator, DataLoader(range(16), 4), "train_loader"))
        print(f"{{accelerator.num_processes}} processes, this one has {{own}} of 16 samples")
    """
    result = launched(2, code, ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="")
    assert result.stdout.count(told) == 2, result.stdout[-3000:]


def test_several_processes_need_something_to_divide() -> None:
    with pytest.raises(ExitkitError, match="train_loader is a list; 2 processes need a torch DataLoader"):
        own_part(SimpleNamespace(num_processes=2), [1, 2], "train_loader")  # type: ignore[arg-type]


# runs that are ended -------------------------------------------------------------------------------------------------


class Slow:
    """Batches that come slowly once ``at`` of them have come, so that a run can be ended in the middle."""

    def __init__(self, batches: DataLoader[tuple[Tensor, ...]], at: int) -> None:
        self.batches, self.left = batches, at
        self.sampler = batches.sampler

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        for batch in self.batches:
            self.left -= 1
            if self.left < 0:
                time.sleep(0.2)
            noise = torch.rand(())  # augmentation in the process itself
            yield [batch[0] + 0.1 * noise, batch[1]]


def endable(directory: str, at: int = 10**9) -> MultiExitModel:
    """A run of three phases with everything that has a state, the same in every process."""
    torch.manual_seed(0)
    images, labels = torch.randn(90, 1, 8, 8), torch.arange(90) % 3
    ee = exitkit.attach(TinyNet(), EXAMPLE, every=1, method="ztw")
    data = TensorDataset(images + labels.view(-1, 1, 1, 1), labels)
    train = Slow(DataLoader(data, batch_size=15, shuffle=True), at)
    val = DataLoader(TensorDataset(images[:30], labels[:30]), batch_size=15)
    loss = Loss(weights="sdn", distillation=Distillation(confidence_limit=0.34))
    options = {"epochs": 6, "patience": 5, "loss": loss, "lr": 1e-2, "show_progress": False}
    Trainer(ee, "mixed-gradual", output_dir=directory, **options).fit(train, val)
    return ee


def child_of(directory: Path, at: int) -> subprocess.Popen[bytes]:
    code = f"from tests.test_runs import endable; endable({str(directory)!r}, at={at})"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=os.environ | {"PYTHONPATH": path})


def checkpoint(directory: Path) -> dict[str, Any]:
    path = directory / "checkpoint.pt"
    loaded: dict[str, Any] = torch.load(path, weights_only=True) if path.exists() else {"history": []}
    return loaded


def wait_for(child: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> MultiExitModel:
    return endable(str(tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_an_ended_run_continues_to_bit_identical_weights(
    tmp_path: Path, uninterrupted: MultiExitModel, sent: signal.Signals, status: int
) -> None:
    """In the middle of epoch 4, the second of phase 2. SIGTERM loses no step, SIGKILL those of the epoch."""
    child = child_of(tmp_path, at=3 * 6 + 2)
    try:
        wait_for(child, lambda: len(checkpoint(tmp_path)["history"]) == 3)
        time.sleep(0.5)
        child.send_signal(sent)
        assert child.wait(timeout=60) == status
    finally:
        child.kill()
    state = checkpoint(tmp_path)
    assert len(state["history"]) == 3
    assert state["phase"] == 1
    assert (state["tally"]["steps"] > 0) == (sent == signal.SIGTERM)
    (tmp_path / ".checkpoint-half.pt").write_bytes(b"half written when it was killed")
    continued = endable(str(tmp_path))
    assert identical(continued, uninterrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.csv"]


def test_sigterm_in_validation_loses_nothing(tmp_path: Path, ee: MultiExitModel, loader: Loaders) -> None:
    """The epoch's steps are written down before it is validated."""
    whole = copy.deepcopy(ee)

    class Signalled:
        def __iter__(self) -> Iterator[Any]:
            os.kill(os.getpid(), signal.SIGTERM)
            return iter(loader(32))

    with pytest.raises(SystemExit, match="143"):
        trainer(ee, epochs=2, output_dir=tmp_path).fit(loader(48, 16, shuffle=True), Signalled())
    assert checkpoint(tmp_path)["tally"]["steps"] == 3
    assert checkpoint(tmp_path)["history"] == []
    history = trainer(ee, epochs=2, output_dir=tmp_path).fit(loader(48, 16, shuffle=True), loader(32))
    assert history == trainer(whole, epochs=2).fit(loader(48, 16, shuffle=True), loader(32))
    assert identical(ee, whole)


def test_without_a_run_directory_sigterm_ends_the_process_as_ever(ee: MultiExitModel) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    class Looking:
        def __iter__(self) -> Iterator[Any]:
            seen.append(signal.getsignal(signal.SIGTERM))
            return iter([(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))])

    trainer(ee).fit(Looking())
    assert seen == [before] * 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_handler_is_put_back(tmp_path: Path, ee: MultiExitModel, loader: Loaders) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer(ee, output_dir=tmp_path).fit(loader(16))
    assert signal.getsignal(signal.SIGTERM) == before


def full_disk(directory: str) -> None:
    """A run in which no file may grow beyond 4 KiB, less than a checkpoint has."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    endable(directory)


def test_a_disk_that_stays_full_ends_no_run(tmp_path: Path) -> None:
    code = f"from tests.test_runs import full_disk; full_disk({str(tmp_path)!r}); print('finished')"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert "finished" in result.stdout
    assert "nothing was written to" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_finished_phase_is_not_trained_again(tmp_path: Path, ee: MultiExitModel, loader: Loaders) -> None:
    whole = copy.deepcopy(ee)
    options = {"epochs": 4, "output_dir": tmp_path}

    class Ending:
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            if self.passes == 3:
                raise KeyboardInterrupt
            return iter(loader())

    with pytest.raises(KeyboardInterrupt):
        trainer(ee, "branch-wise", **options).fit(Ending())
    trainer(ee, "branch-wise", **options).fit(loader())
    trainer(whole, "branch-wise", epochs=4).fit(loader())
    assert identical(ee, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regime": "alternating"}, "regime="),
        ({"loss": Loss(weights="sdn")}, "loss="),
        ({"optimizer": torch.optim.AdamW}, r"optimizer='Adam\("),
        ({"backbone_lr": 1e-4}, r"backbone_lr=None, this run has 0\.0001"),
        ({"accumulate": 2}, "accumulate=1, this run has 2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, ee: MultiExitModel, loader: Loaders, options: dict[str, Any], message: str
) -> None:
    trainer(ee, output_dir=tmp_path).fit(loader(16))
    with pytest.raises(ExitkitError, match=message):
        trainer(ee, **({"regime": "mixed"} | options), output_dir=tmp_path).fit(loader(16))


def test_a_refused_checkpoint_leaves_the_model_as_it_was(tmp_path: Path, ee: MultiExitModel, loader: Loaders) -> None:
    """Heads of which one has the shapes of the checkpoint's, and a backbone of which other parameters learn."""
    mixed = exitkit.attach(ee.backbone, EXAMPLE, every=1, method="sdn", head=["2L-8", "2L-8", "2L-8"])
    trainer(mixed, output_dir=tmp_path).fit(loader(16))
    other = exitkit.attach(copy.deepcopy(ee.backbone), EXAMPLE, every=1, method="sdn", head=["2L-8", "2L-8", "2L-9"])
    before = copy.deepcopy(other)
    with pytest.raises(ExitkitError, match="belongs to other heads; use another output_dir, or resume='never'"):
        trainer(other, output_dir=tmp_path).fit(loader(16))
    assert identical(other, before)
    before = copy.deepcopy(mixed)
    mixed.backbone.stem.requires_grad_(False)
    with pytest.raises(ExitkitError, match="belongs to a model of which other parameters learn"):
        trainer(mixed, output_dir=tmp_path).fit(loader(16))
    assert identical(mixed, before)


# what is shown -------------------------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_a_line_per_epoch(
    ee: MultiExitModel, loader: Loaders, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer(ee, epochs=2, show_progress=True).fit(loader(), loader())
    out, err = capfd.readouterr()
    first, second = [line for line in err.splitlines() if line.startswith("epoch")]
    assert out == ""
    assert all(part in first for part in ("epoch 1  phase 1  loss 0: ", " 3: ", "val 0: ", "%", "/s", "0:00:0"))
    assert second.startswith("epoch 2")


def test_nothing_is_shown_that_nobody_asked_for(
    ee: MultiExitModel, loader: Loaders, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer(ee).fit(loader())
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_a_table(
    ee: MultiExitModel, loader: Loaders, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    trainer(ee, "branch-wise", epochs=4, show_progress=True).fit(loader(), loader())
    shown = capfd.readouterr().err
    for part in ("exit", "loss", "epoch 1", "epoch 4", "phase 1 of 4", "phase 4 of 4", "%"):
        assert part in shown


def test_every_exit_of_many_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = tuple(m + 0.25 for m in range(26))
    records = [Epoch(e, losses, tuple(m / 26 for m in range(27)), 0, tuple(range(26))) for e in range(8)]
    line = records[0].line()
    assert " 26: 100.0%" in line
    for m in range(26):
        assert f" {m}: {m}.2500" in line
        assert f" {m}: {m / 26:.1%}" in line
    display = Display(False, False, epochs=9, phases=1, steps=10)
    display.records = records
    text = drawn(display)
    assert max(map(len, text.splitlines())) <= 80
    headings = text.splitlines()[0].split()
    assert headings == ["exit", "loss", *(word for e in range(3, 9) for word in ("epoch", str(e)))]
    rows = [row.split() for row in text.splitlines() if row[:4].strip().isdigit()]
    assert [row[:2] for row in rows] == [*([str(m), f"{m}.2500"] for m in range(26)), ["26", "100.0%"]]
    assert all(row[-6:] == [f"{m / 26:.1%}"] * 6 for m, row in enumerate(rows))


def test_an_exit_that_learns_alone_stands_in_its_own_row() -> None:
    display = Display(False, False, epochs=4, phases=2, steps=10)
    display.records = [Epoch(0, (0.5,), None, 1, (2,))]
    text = drawn(display)
    assert "phase 2 of 2" in text
    assert [row.split() for row in text.splitlines() if row[:4].strip().isdigit()] == [
        ["0"],
        ["1"],
        ["2", "0.5000", "0.5000"],
    ]


def drawn(display: Display) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(display)
    return console.export_text()


def test_time_left_counts_the_epochs_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = Display(False, False, epochs=4, phases=1, steps=10)
    display.resume(1, Path("checkpoint.pt"))
    now[0] = 5.0
    for _ in range(5):
        display.step(torch.ones(2), 16)
    assert display._left(5) == "0:00:25 left"
    assert display._left(10) == "0:00:20 left"
