"""Writing files: two savers at once, other threads' permissions, links, full disks."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import exitkit
from exitkit.common.errors import FileError
from exitkit.common.files import replacing
from exitkit.multi_exit.saving import folder
from tests.toy import TinyNet, images

SAVER = """
import sys, torch, exitkit
from tests.toy import TinyNet, images, noisy
torch.manual_seed(0)
ee = exitkit.attach(TinyNet().eval(), images(), every=2, method="sdn")
with torch.no_grad():
    for parameter in ee.added_parameters():
        parameter.fill_(float(sys.argv[2]))
print("ready", flush=True); sys.stdin.readline()
for _ in range(25):
    ee.save_pretrained(sys.argv[1])
    with torch.no_grad():
        for parameter in ee.added_parameters():
            parameter.add_(1)
"""


def test_two_savers_and_a_reader(tmp_path: Path) -> None:
    """The last complete save wins; a reader sees one or another, whole, and no raw error."""
    torch.manual_seed(0)
    net = TinyNet().eval()
    exitkit.attach(net, images(), every=2, method="sdn").save_pretrained(tmp_path)
    savers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SAVER, str(tmp_path), start],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for start in ("1000", "2000")
    ]  # fmt: skip
    for saver in savers:
        assert saver.stdout is not None
        assert saver.stdin is not None
        saver.stdout.readline()
    for saver in savers:
        assert saver.stdin is not None
        saver.stdin.write("go\n")
        saver.stdin.flush()
    reads = 0
    while any(saver.poll() is None for saver in savers):
        ee = exitkit.MultiExitModel.from_pretrained(net, tmp_path, images())
        weights = [float(parameter.detach().flatten()[0]) for parameter in ee.classifiers.parameters()]
        assert len(set(weights)) == 1 or weights[0] < 1000  # all of one save
        reads += 1
    assert [saver.wait() for saver in savers] == [0, 0]
    assert reads > 0
    last = exitkit.MultiExitModel.from_pretrained(net, tmp_path, images())
    assert float(next(last.classifiers.parameters()).detach().flatten()[0]) in (1024.0, 2024.0)
    assert len(list(tmp_path.glob("exits-*.safetensors"))) == 1


def test_a_save_inside_another_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second save begins where the first has written its weights, but not yet the configuration that names them."""
    torch.manual_seed(0)
    net = TinyNet().eval()
    first, second = (exitkit.attach(net, images(), every=2, method="sdn") for _ in range(2))
    others: list[threading.Thread] = []

    def interrupted(path: Path) -> Any:
        if path.name == "config.json" and not others:
            others.append(threading.Thread(target=second.save_pretrained, args=(tmp_path,)))
            others[0].start()
            others[0].join(1.0)  # it waits for the first, or runs to its end
        return replacing(path)

    monkeypatch.setattr(folder, "replacing", interrupted)
    first.save_pretrained(tmp_path)
    others[0].join()
    exitkit.MultiExitModel.from_pretrained(net, tmp_path, images())


def test_a_read_inside_a_save_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = TinyNet().eval()
    first, second = (exitkit.attach(net, images(), every=2, method="sdn") for _ in range(2))
    first.save_pretrained(tmp_path)
    read, reads = folder.read_configuration, []

    def overtaken(path: Path) -> Any:
        config = read(path)
        if not reads:
            second.save_pretrained(tmp_path)
        reads.append(path)
        return config

    monkeypatch.setattr(folder, "read_configuration", overtaken)
    loaded = exitkit.MultiExitModel.from_pretrained(net, tmp_path, images())
    pairs = zip(loaded.classifiers.parameters(), second.classifiers.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_umask_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the process: another thread's files would come out with the permissions of that moment."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the process's umask was set"))
    with replacing(tmp_path / "new.txt") as temporary:
        temporary.write_text("new")
    monkeypatch.undo()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new.txt").stat().st_mode) == 0o666 & ~mask
    log_probs = torch.zeros(4, 2, 3)
    exitkit.ExitOutputs(log_probs, None, torch.tensor([1.0, 2.0]), 2.0).save(tmp_path / "outputs.safetensors")
    assert stat.S_IMODE((tmp_path / "outputs.safetensors").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o664])
def test_permissions_of_an_existing_file_stay(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("old")
    path.chmod(mode)
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_symbolic_link_goes_on_pointing_where_it_does(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "there" / "file.txt")
    for text in ("first", "second"):  # where the file is not there yet, and where it is
        with replacing(tmp_path / "link.txt") as temporary:
            temporary.write_text(text)
        assert (tmp_path / "link.txt").is_symlink()
        assert (tmp_path / "there" / "file.txt").read_text() == text


def test_it_is_on_the_disk_before_it_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, move = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (happened.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (happened.append("move"), move(self, to))[1])
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
    assert happened == ["fsync", "move"]


def test_a_full_disk_is_one_clear_error_and_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")

    def fill() -> None:
        with replacing(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FileError, match=r"out\.txt' cannot be written: No space left on device; what was there"):
        fill()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.txt"]


def test_a_folder_that_is_a_file_and_a_name_too_long(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.txt", tmp_path / ("x" * 300)):
        with pytest.raises(FileError, match="cannot be written"), replacing(path) as temporary:
            temporary.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "write",
    [
        lambda ee, folder: ee.save_pretrained(folder),
        lambda ee, folder: exitkit.collect(ee, [torch.zeros(2, 1, 8, 8)], folder / "outputs.safetensors"),
        lambda ee, folder: exitkit.export(ee, folder / "model.pt2", 0.5),
    ],
    ids=["save", "collect", "export"],
)
def test_a_folder_that_cannot_be_made(tiny_ee: exitkit.MultiExitModel, tmp_path: Path, write: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot be written: Not a directory") as caught:
        write(tiny_ee, tmp_path / "file" / "exits")
    assert isinstance(caught.value, OSError)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_may_not_be_written(
    tiny_ee: exitkit.MultiExitModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # to root every folder is open
    with pytest.raises(FileError, match=r"cannot be written: Permission denied; give one where you may write"):
        tiny_ee.save_pretrained(tmp_path)


def test_threads_that_write_at_once(tmp_path: Path) -> None:
    def write(name: str) -> None:
        for _ in range(20):
            with replacing(tmp_path / "shared.txt") as temporary:
                temporary.write_text(name * 1000)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "shared.txt").read_text() in {name * 1000 for name in "abcd"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EFBIG])
def test_a_disk_that_fills_while_outputs_are_collected(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ee = exitkit.attach(TinyNet().eval(), images(), every=2, method="sdn")
    path = tmp_path / "outputs.safetensors"
    exitkit.collect(ee, [images(8)], path)
    before = path.read_bytes()

    def full(**_: Any) -> Any:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("exitkit.evaluation.collecting.tempfile.NamedTemporaryFile", full)
    with pytest.raises(
        FileError, match=rf"outputs\.safetensors' cannot be written: {os.strerror(reason)}; what was there"
    ):
        exitkit.collect(ee, [images(8)], path)
    assert path.read_bytes() == before


def test_an_error_of_the_data_set_stays_its_own(tmp_path: Path) -> None:
    class Broken:
        def __iter__(self) -> Any:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "photo.jpg")

    ee = exitkit.attach(TinyNet().eval(), images(), every=2, method="sdn")
    with pytest.raises(FileNotFoundError, match=r"photo\.jpg"):
        exitkit.collect(ee, Broken(), tmp_path / "outputs.safetensors")  # type: ignore[arg-type]
