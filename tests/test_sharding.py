"""Models divided among processes by FSDP2: the weights of one process, plain models afterwards, checkpoints for any number."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import exitkit
from exitkit import ExitkitError, MultiExitModel, Trainer
from tests.test_runs import checkpoint, launched

IMAGES = torch.zeros(2, 3, 8, 8)
COMPARED = 2 * 32
"""Samples that are read before a run, to tell its data from another's."""
MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


class Block(nn.Module):
    """Of a Vision Transformer, before its norm; without dropout, which depends on how a batch is divided."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        added: Tensor = x + self.mlp(self.norm2(x))
        return added


class TinyViT(nn.Module):
    """Three blocks on 3×8×8 images. One weight is a scalar, and five classes do not divide by two processes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 10, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 10) * 0.02)
        self.blocks = nn.ModuleList(Block(10) for _ in range(3))
        self.norm = nn.LayerNorm(10)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.head(self.norm(tokens[:, 0])) * self.scale
        return out


def attached(model: nn.Module | None = None) -> MultiExitModel:
    """The weights of the main process count: others draw theirs from other seeds."""
    torch.manual_seed(1 + int(os.environ.get("RANK", 0)))
    return exitkit.attach(model or TinyViT(), IMAGES, every=1, method="ztw")


class Samples(Dataset[Any]):
    """Images whose class can be seen; once ``ending`` of them were read, the second process is sent SIGTERM."""

    def __init__(self, count: int, ending: int | None = None) -> None:
        torch.manual_seed(0)
        self.labels = torch.arange(count) % 5
        self.images = torch.randn(count, 3, 8, 8) + self.labels.view(-1, 1, 1, 1)
        self.left = ending

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        if self.left is not None:
            self.left -= 1
            if self.left == 0 and int(os.environ.get("RANK", 1)) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return self.images[number], self.labels[number]


def fitted(batch: int, ending: int | None = None, **options: Any) -> tuple[MultiExitModel, list[Any]]:
    ee = attached()
    train = DataLoader(Samples(48, ending), batch, shuffle=True, generator=torch.Generator())
    val = DataLoader(Samples(20), batch)
    settings = {"regime": "mixed", "epochs": 2, "lr": 1e-2, "optimizer": torch.optim.SGD, "show_progress": False}
    history = Trainer(ee, **(settings | options)).fit(train, val)  # type: ignore[arg-type]
    return ee, [(record.loss, record.val_loss) for record in history]


DIVIDED: dict[str, dict[str, Any]] = {
    "mixed": {"accumulate": 2, "max_grad_norm": 1.0, "patience": 3, "optimizer": MOMENTUM},
    "joint": {"regime": "joint"},
    "separate": {"regime": "separate", "epochs": 3},
    "bf16": {"mixed_precision": "bf16"},
}


def divided(directory: str, batch: int) -> None:
    """Every run of DIVIDED; each process writes down what it has afterwards, and the exits are saved by one."""
    rank = os.environ.get("RANK", "0")
    for name, options in DIVIDED.items():
        ee, history = fitted(batch, **options)
        torch.save({"weights": ee.state_dict(), "history": history}, f"{directory}/{name}-{rank}.pt")
        assert not any(hasattr(value, "device_mesh") for value in (*ee.parameters(), *ee.buffers()))
        assert {type(module).__name__ for module in ee.backbone.blocks} == {"Block"}
    if "RANK" in os.environ:
        for option in ({"compile": True}, {"analyse": "gradient_dominance"}):
            with pytest.raises(ExitkitError, match=f"{next(iter(option))}=.* needs the whole model .* FSDP"):
                fitted(batch, **option)
    if rank == "0":
        ee.save_pretrained(f"{directory}/exits")
        torch.save(ee.backbone.state_dict(), f"{directory}/backbone.pt")
        with torch.no_grad():
            torch.save(ee(IMAGES).logits, f"{directory}/answers.pt")


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``accelerate launch --use_fsdp --fsdp_version 2`` tells every process."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")


def in_two(call: str) -> None:
    result = launched(2, f"from tests.test_sharding import *; {call}")
    assert result.returncode == 0, result.stdout[-3000:]


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """But for the ensemble, whose fit stops a little earlier or later along a flat valley."""
    for name in one.keys() | other.keys():
        if not name.startswith("combiners."):
            torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=tolerance, msg=name)


def test_a_divided_model_ends_with_the_weights_of_a_whole_one(tmp_path: Path, fsdp: None) -> None:
    """Batches of 8 in each of two processes, against 16 in one; accumulated steps, clipping, momentum and patience included.

    Both end with the same plain model, whose exits are saved in one file and load without any process beside.
    """
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    in_two(f"divided({str(tmp_path / 'two')!r}, 8)")
    divided(str(tmp_path / "one"), 16)
    for name in DIVIDED:
        one, two, second = (
            torch.load(tmp_path / run, weights_only=True)
            for run in (f"one/{name}-0.pt", f"two/{name}-0.pt", f"two/{name}-1.pt")
        )
        tolerance = 2e-2 if name == "bf16" else 1e-6
        close(one["weights"], two["weights"], tolerance)
        assert list(one["weights"]) == list(two["weights"])
        assert all(torch.equal(value, second["weights"][key]) for key, value in two["weights"].items())
        for before, after in zip(one["history"], two["history"], strict=True):
            assert before == tuple(pytest.approx(part, abs=10 * tolerance) for part in after)
    assert len(list((tmp_path / "two" / "exits").glob("*.safetensors"))) == 1
    backbone = TinyViT()
    backbone.load_state_dict(torch.load(tmp_path / "two" / "backbone.pt", weights_only=True))
    loaded = MultiExitModel.from_pretrained(backbone, tmp_path / "two" / "exits", IMAGES)
    answers = torch.load(tmp_path / "two" / "answers.pt", weights_only=True)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded.eval()(IMAGES).logits, answers, strict=True))


def resumed(directory: str, batch: int, ending: int | None = None) -> None:
    """A run of two phases with everything that a checkpoint holds, which may be ended in its second epoch."""
    options = {"regime": "mixed-gradual", "epochs": 4, "patience": 3, "optimizer": MOMENTUM}
    try:
        ee, history = fitted(batch, ending, output_dir=f"{directory}/run", **options)
    except SystemExit as ended:
        sys.exit(0 if ending is not None and ended.code == 143 else 1)
    assert ending is None
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save({"weights": ee.state_dict(), "history": history}, f"{directory}/result.pt")


def ended_alone(directory: str, batch: int, ending: int) -> None:
    with pytest.raises(SystemExit, match="0"):
        resumed(directory, batch, ending)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("whole")
    resumed(str(directory), 16)
    result: dict[str, Any] = torch.load(directory / "result.pt", weights_only=True)
    return result


def test_a_run_that_two_processes_began_is_finished_by_one(
    tmp_path: Path, fsdp: None, uninterrupted: dict[str, Any]
) -> None:
    """SIGTERM to one of them, in the second epoch, ends both at one step."""
    in_two(f"resumed({str(tmp_path)!r}, 8, ending=COMPARED + 24 + 12)")
    state = checkpoint(tmp_path / "run")
    assert len(state["history"]) == 1
    assert 0 < state["tally"]["steps"] < 3
    shards = [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]
    assert shards == [state["shards"]]
    half_written = tmp_path / "run" / "checkpoint-shards-0"
    half_written.mkdir()
    resumed(str(tmp_path), 16)
    same_as(tmp_path, uninterrupted)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.pt", "metrics.csv"]


def test_a_run_that_one_process_began_is_finished_by_two(
    tmp_path: Path, fsdp: None, uninterrupted: dict[str, Any]
) -> None:
    ended_alone(str(tmp_path), 16, COMPARED + 48 + 20)
    assert "shards" not in checkpoint(tmp_path / "run")
    in_two(f"resumed({str(tmp_path)!r}, 8)")
    same_as(tmp_path, uninterrupted)
    shards = checkpoint(tmp_path / "run")["shards"]
    one, other = (tmp_path / "run" / shards).iterdir()
    one.write_bytes(b"x" * one.stat().st_size)
    with pytest.raises(ExitkitError, match=rf"{shards}' is damaged .*resume='never'"):
        resumed(str(tmp_path), 16)
    other.unlink()
    with pytest.raises(ExitkitError, match=rf"{shards}' is damaged .*not those that were written"):
        resumed(str(tmp_path), 16)


def same_as(directory: Path, whole: dict[str, Any]) -> None:
    result = torch.load(directory / "result.pt", weights_only=True)
    close(whole["weights"], result["weights"], 1e-5)
    for before, after in zip(whole["history"], result["history"], strict=True):
        assert before == tuple(pytest.approx(part, abs=1e-4) for part in after)
