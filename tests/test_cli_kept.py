"""Nothing is lost: a training run that was stopped or killed goes on, results that cannot be written are elsewhere."""

# ruff: noqa: F811  (fixtures of tests.test_cli)

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.test_cli import TOY, images, invoke, refused, run  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 12


@pytest.fixture
def recipe(images: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'model = "{TOY}"\ndata = "{images}"\nbatch_size = 8\n[exits]\nat = ["blocks.1"]\n[trainer]\nepochs = {EPOCHS}\n'
    )
    return path


def stopped(recipe: Path, out: Path, number: int) -> tuple[int, str]:
    """``exitkit train`` in a process of its own, sent a signal after the next checkpoint: its status and what it said."""
    command = [sys.executable, "-W", "ignore", "-m", "exitkit", "train", str(recipe), "--trust", "--out", str(out)]
    checkpoint = out / "checkpoint.pt"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
            process.send_signal(number)
            break
        time.sleep(0.001)
    said, _ = process.communicate(timeout=240)
    return process.returncode, said


def exits(out: Path) -> dict[str, Any]:
    return load_file(next((out / "exits" / "ztw").glob("*.safetensors")))


def test_a_run_goes_on_after_ctrl_c_and_after_it_was_killed(
    invoke: Any,
    run: Any,
    recipe: Path,
    tmp_path: Path,
) -> None:
    code, said = stopped(recipe, tmp_path / "out", signal.SIGINT)
    assert code == 130, said
    assert f"stopped; kept in {tmp_path / 'out' / 'checkpoint.pt'}. The same command goes on from there" in said
    assert "Traceback" not in said
    code, _ = stopped(recipe, tmp_path / "out", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "out" / "results.json").exists()

    code, _, said = invoke("train", recipe, "--trust", "--out", tmp_path / "out")
    assert code in (0, None)
    assert f"going on from {tmp_path / 'out' / 'checkpoint.pt'}\n" in said
    run("train", recipe, "--trust", "--out", tmp_path / "whole")
    whole, continued = exits(tmp_path / "whole"), exits(tmp_path / "out")
    assert whole.keys() == continued.keys()
    assert all(whole[name].equal(continued[name]) for name in whole)
    rows = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [str(epoch) for epoch in range(EPOCHS)]
    assert not (tmp_path / "out" / "checkpoint.pt").exists()  # the results are there


def test_a_changed_recipe_is_not_taken_for_the_run_that_was_stopped(
    invoke: Any,
    run: Any,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("exitkit.cli.recipes.training.collect", broken)
        with pytest.raises(AssertionError):
            run("train", recipe, "--trust", "--out", tmp_path / "out", "--epochs", 1)
    other = ("train", recipe, "--trust", "--out", tmp_path / "out", "--epochs", 2)
    code, printed, error = invoke(*other)
    assert code == 2
    assert "--set trainer.resume=never" in error
    assert "going on" not in printed + error
    run(*other, "--set", "trainer.resume=never")
    assert (tmp_path / "out" / "results.json").exists()


def after_training(monkeypatch: pytest.MonkeyPatch, module: str, happens: Callable[[], Any]) -> None:
    """Something happens when the exits are trained and their outputs collected."""
    from exitkit.evaluation import collect

    def collecting(*arguments: Any) -> Any:
        outputs = collect(*arguments)
        happens()
        return outputs

    monkeypatch.setattr(f"{module}.collect", collecting)


def test_a_disk_that_is_full_after_training_costs_no_epoch(
    run: Any,
    invoke: Any,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    command = ("train", recipe, "--trust", "--out", tmp_path / "out", "--epochs", 2)
    with monkeypatch.context() as patched:
        after_training(
            patched, "exitkit.cli.recipes.training", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        )
        try:
            code, printed, error = invoke(*command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "25%" in printed  # the table is shown, whatever can be written
    assert error.splitlines()[-1].startswith(f"exitkit: --out '{tmp_path / 'out'}'")
    assert "File too large" in error
    assert "Traceback" not in error
    code, _, error = invoke(*command)
    assert code == 0
    assert "epoch 1" not in error  # nothing is trained again
    assert (tmp_path / "out" / "results.json").exists()


def test_a_folder_that_cannot_be_written_to_after_training_loses_no_result(
    refused: Any,
    run: Any,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with monkeypatch.context() as patched:
        after_training(patched, "exitkit.cli.bench", lambda: out.write_text("taken"))
        error = refused(*("bench", "--model", TOY, "--data", images, "--epochs", 1, "--methods", "sdn", "--out", out))
    told = error.splitlines()[-1]
    assert "The results are in" in told
    instead = Path(told.split("The results are in '")[1].split("'")[0])
    assert {"results.json", "outputs-sdn.safetensors", "exits"} <= {path.name for path in instead.iterdir()}
    run("report", instead)


@pytest.mark.parametrize("command", ["bench", "train"])
def test_a_run_that_another_process_finished_meanwhile_is_not_replaced(
    command: str,
    refused: Any,
    recipe: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def happens() -> None:
        out.mkdir(exist_ok=True)
        (out / "results.json").write_text("another's")

    after_training(monkeypatch, f"exitkit.cli.{'bench' if command == 'bench' else 'recipes.training'}", happens)
    given = ("--model", TOY, "--data", images, "--methods", "sdn") if command == "bench" else (recipe, "--trust")
    told = refused(command, *given, "--epochs", 1, "--out", out).splitlines()[-1]
    assert "another process has written its run there meanwhile. The results are in" in told
    assert (out / "results.json").read_text() == "another's"
    assert (Path(told.split("The results are in '")[1].split("'")[0]) / "results.json").exists()


def test_a_finished_run_is_not_replaced(
    run: Any,
    refused: Any,
    recipe: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench, trained = tmp_path / "bench", tmp_path / "trained"
    commands = [
        ("bench", "--model", TOY, "--data", images, "--epochs", 1, "--methods", "sdn", "--out", bench),
        ("train", recipe, "--trust", "--epochs", 1, "--out", trained),
    ]
    for command in commands:
        run(*command)
    monkeypatch.setattr("exitkit.training.Trainer.fit", lambda *_: pytest.fail("it trains"))
    before = {path: path.read_bytes() for out in (bench, trained) for path in out.rglob("*") if path.is_file()}
    for *command, out in [*commands, ("demo", "--out", bench)]:
        told = refused(*command, out)
        assert f"--out '{out}' holds a run already, which would be lost; name another folder, or remove it" in told
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_before_training(refused: Any, images: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    error = refused("bench", "--model", TOY, "--data", images, "--out", tmp_path / "closed" / "run")
    assert "cannot be written to: Permission denied" in error


def test_ctrl_c_keeps_the_methods_that_were_finished(
    invoke: Any,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits = []

    def fit(self: Any, *loaders: Any) -> Any:
        fits.append(self)
        if len(fits) == 2:
            raise KeyboardInterrupt
        return original(self, *loaders)

    from exitkit.training import Trainer

    original = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", fit)
    out = tmp_path / "run"
    code, _, error = invoke(
        *("bench", "--model", TOY, "--data", images, "--epochs", 1, "--methods", "sdn,ztw", "--out", out)
    )
    assert code == 130
    assert f"stopped; kept in {out}: sdn" in error
    assert (out / "exits" / "sdn" / "config.json").exists()
    assert not (out / "exits" / "ztw").exists()
