"""Every kind of file, damaged and lied in a few thousand ways: one clear error, or what was written. A fixed seed.

Bytes are flipped, cut out, doubled and moved; JSON and TOML are also changed by structure, with the digests beside them made
right again, as a liar would. Each reading may take ten seconds, may raise ExitkitError alone, and gives back either what was
saved or, of a file whose digest is right, something that can be used.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import exitkit
from exitkit import ExitkitError
from exitkit.cli.data.arrays import read_npz
from exitkit.cli.data.text_files import _label_indices, _numbers, _read_text
from exitkit.cli.recipes.recipe import read_recipe
from exitkit.evaluation import RegressionOutputs
from exitkit.multi_exit.image_files import opened_image
from exitkit.multi_exit.preprocessing import ImagePreprocessing
from exitkit.packages.onnx_branches import signed
from exitkit.report import calibrated, read_run, write_thresholds
from exitkit.training.checkpoint import load_checkpoint, save_checkpoint
from tests.toy import TinyNet, images, noisy

pytestmark = pytest.mark.filterwarnings("ignore")
_SECONDS = 10
Change = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        make: writes one into a folder and returns its path.
        read: what loading it gives; must raise ExitkitError or return.
        exact: whether damage must be noticed: what comes back is what was written.
        changes: how it is damaged, with how many mutations of each.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    exact: bool
    changes: dict[Change, int]


# --- how files are damaged ---------------------------------------------------------------------------------------------


def bits(content: bytes, chance: random.Random) -> bytes:
    """One to four bits flipped."""
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def spans(content: bytes, chance: random.Random) -> bytes:
    """A span cut out, doubled, zeroed, moved, or filled with noise; or the file cut short."""
    start = chance.randrange(len(content))
    stop = min(len(content), start + chance.choice([1, 4, 64, 1024, len(content)]))
    span = content[start:stop]
    rest = content[:start], content[stop:]
    place = chance.randrange(len(content))
    mutated: list[bytes] = [
        rest[0] + rest[1],
        rest[0] + span + span + rest[1],
        rest[0] + bytes(len(span)) + rest[1],
        rest[0] + chance.randbytes(len(span)) + rest[1],
        content[:place] + span + content[place:],
        content[:start],
    ]
    return chance.choice(mutated)


NASTY: list[Any] = [
    None, True, "false", -1, 0, 0.5, 3, 10**400, -(10**400), 2**63, float("nan"), float("inf"), 1e308, "", "\ud800",
    "x" * 5000, "9" * 5000, "1", [], {}, [[]], [None], {"a": 1}, [0] * 1000, "../../etc/passwd", "[red]", "=1+1",
]  # fmt: skip


def lie(document: Any, chance: random.Random) -> Any:
    """One place of a JSON document changed: another value, a missing, a doubled or a renamed entry, or depth."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    if not places or chance.random() < 0.02:
        return chance.choice(NASTY)
    owner, key = chance.choice(places)
    match chance.randrange(6):
        case 0 if isinstance(owner, dict):
            owner[chance.choice(["unknown", "", "__class__", str(key).upper()])] = owner.pop(key)
        case 1:
            del owner[key]
        case 2 if isinstance(owner, list):
            owner.append(copy.deepcopy(owner[key]))
        case 3:
            for _ in range(chance.choice([1, 50])):
                owner[key] = [owner[key]]
        case _:
            owner[key] = chance.choice(NASTY)
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(entries):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def json_lies(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.02:
        return chance.choice([b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"", b"null"])
    return json.dumps(lie(json.loads(content), chance)).encode("utf-8", "surrogatepass")


def config_lies(content: bytes, chance: random.Random) -> bytes:
    """A configuration changed by structure, its hash made right again."""
    document = lie(json.loads(content), chance)
    if isinstance(document, dict):
        rest = {key: value for key, value in document.items() if key != "sha256"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        document = {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(document).encode()


def toml_lies(content: bytes, chance: random.Random) -> bytes:
    lines = content.decode().splitlines()
    at = chance.randrange(len(lines))
    key, equals, value = lines[at].partition("=")
    texts = [
        "-1", "0", "1" * 5000, "0x" + "f" * 400, "nan", "inf", "1e999", "true", '"false"', '""', "[]", "{}", "[[1]]",
        "[" * 5000, '"' + "x" * 300 + '"', "1979-05-27", "'''", '"\\ud800"', "{name = 3}", "[1, 'a']", '"../../x"', "3.5",
    ]  # fmt: skip
    if equals and chance.random() < 0.8:
        lines[at] = f"{key}= {chance.choice(texts)}"
    else:
        lines.insert(
            at, chance.choice([lines[at], "[unknown]", "unknown = 1", "[trainer]", "", f"{value} = 1", "= 3"])
        )
    return "\n".join(lines).encode()


def entry_bits(content: bytes, chance: random.Random) -> bytes:
    """A bit flipped in what a zip holds, the zip's own checksums made right again."""
    contents = _unzipped(content)
    name = chance.choice(list(contents))
    return _zipped({**contents, name: bits(contents[name], chance)})


def manifest_lies(content: bytes, chance: random.Random) -> bytes:
    contents = _unzipped(content)
    contents["manifest.json"] = json_lies(contents["manifest.json"], chance)
    contents["manifest.sha256"] = hashlib.sha256(contents["manifest.json"]).hexdigest().encode()
    return _zipped(contents)


def metadata_lies(content: bytes, chance: random.Random) -> bytes:
    import onnx

    model = onnx.load_from_string(content)
    entry = next(entry for entry in model.metadata_props if entry.key == "exitkit")
    entry.value = json_lies(entry.value.encode(), chance).decode("utf-8", "replace")
    del model.metadata_props[1:]
    return signed(model.SerializeToString())


def _unzipped(content: bytes) -> dict[str, bytes]:
    import io

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(contents: dict[str, bytes]) -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return buffer.getvalue()


# --- the kinds of files ------------------------------------------------------------------------------------------------


def _ee() -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return noisy(exitkit.attach(TinyNet().eval(), images(), every=2, method="sdn"))


def _package(ending: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"model{ending}"
        exitkit.export(
            _ee(), path, 0.5, labels=["a", "b", "c"], preprocessing=ImagePreprocessing((1, 8, 8), (0.5,), (0.5,))
        )
        return path

    return make


def _answers(path: Path) -> Any:
    """What a package answers, and says."""
    loaded = exitkit.load(path)
    answer = loaded(images(3))
    assert bool(answer.logits.isfinite().all())
    return [*answer, str(loaded.policy), str(loaded.description)]


def _outputs() -> exitkit.ExitOutputs:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(60, 3, 4, generator=generator).log_softmax(-1)
    labels, hashes = torch.randint(4, (60,), generator=generator), torch.arange(60)
    return exitkit.ExitOutputs(
        log_probs, labels, torch.tensor([1.0, 2.0, 4.0]), 4.0, "margin", hashes, temperatures=(1, 2, 1)
    )


def _make_outputs(folder: Path) -> Path:
    _outputs().save(folder / "outputs.safetensors")
    return folder / "outputs.safetensors"


def _make_regression(folder: Path) -> Path:
    predictions = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    outputs = RegressionOutputs(predictions, torch.arange(40.0), torch.tensor([1.0, 2.0, 4.0]), 4.0)
    outputs.save(folder / "outputs.safetensors")
    return folder / "outputs.safetensors"


def _values(loaded: Any) -> Any:
    return [value for _, value in sorted(vars(loaded).items())]


def _make_exits(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        _ee().save_pretrained(folder, threshold=0.5)
        return next(folder.glob(name))

    return make


def _read_exits(path: Path) -> Any:
    torch.manual_seed(0)
    ee = exitkit.MultiExitModel.from_pretrained(TinyNet().eval(), path.parent, images())
    return [*ee.added_parameters(), str(ee.threshold)]


def _make_checkpoint(folder: Path) -> Path:
    state = {"model": {"w": torch.randn(50), "b": torch.arange(5)}, "epoch": 3, "history": [{"loss": 0.5}]}
    save_checkpoint(folder, {"epochs": 5, "lr": 1e-3}, state)
    return folder / "checkpoint.pt"


def _make_run(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        outputs = _outputs()
        outputs.save(folder / "outputs-ztw.safetensors")
        stage = {"exit": "a", "macs": 1.0, "head_macs": 0.5, "milliseconds": 1.5, "head_milliseconds": 0.5, "batch": 8}
        methods = {"ztw": {"criterion": "margin", "stages": [stage] * 3}}
        (folder / "results.json").write_text(json.dumps({"about": {"model": "m", "epochs": 3}, "methods": methods}))
        sample = {"row": 3, "image": "data:image/webp;base64,AAAA", "text": "a text"}
        (folder / "samples.json").write_text(json.dumps({"classes": ["a", "b", "c", "d"], "samples": [sample] * 2}))
        chosen = calibrated(outputs, None, 0.5, 0, max_drop=0.5, confidence=0.8)
        write_thresholds(folder, {"ztw": chosen})
        return folder / name

    return make


def _read_thresholds(path: Path) -> Any:
    one = read_run(path.parent).results.get("ztw")
    return None if one is None else str(one.calibrated)


RECIPE = """
model = "exitkit.models:cifar_resnet"
data = "d.npz"
batch_size = 16
limit = 10
validation = 0.25
pairs = false
augment = ["flip"]
[exits]
every = 2
head = "2L-16"
method = {name = "gpf"}
[trainer]
epochs = 3
lr = 0.001
output_dir = "run"
patience = 2
seed = 3
[optimizer]
name = "sgd"
momentum = 0.9
[schedule]
name = "cosine"
warmup = 0.1
[loss]
label_smoothing = 0.1
[loss.distillation]
weight = 0.5
temperature = 2.0
"""


def _make_recipe(folder: Path) -> Path:
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"


def _make_npz(folder: Path) -> Path:
    np.savez(folder / "d.npz", images=np.arange(20 * 64, dtype=np.uint8).reshape(20, 8, 8), labels=np.arange(20) % 3)
    return folder / "d.npz"


def _make_image(folder: Path) -> Path:
    from PIL import Image

    Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(folder / "a.png")
    return folder / "a.png"


def _make_table(folder: Path) -> Path:
    rows = "".join(f'"text {row}, so",more {row},{row % 3}\n' for row in range(20))
    (folder / "d.csv").write_text(f"text,more,label\n{rows}")
    return folder / "d.csv"


def _read_table(path: Path) -> Any:
    _, rows = _read_text(path, pairs=True)
    labels = {label for _, label in rows}
    with suppress(ExitkitError):
        _label_indices(labels, "--data", unlabelled=False)
    with suppress(ExitkitError):
        _numbers(labels)
    return None


KINDS = {
    "package .pt2": Kind(_package(".pt2"), _answers, True, {bits: 120, spans: 80, entry_bits: 80}),
    "package .pt2, lies": Kind(_package(".pt2"), _answers, False, {manifest_lies: 60}),
    "package .onnx.zip": Kind(_package(".onnx.zip"), _answers, True, {bits: 120, spans: 80, entry_bits: 80}),
    "package .onnx.zip, lies": Kind(_package(".onnx.zip"), _answers, False, {manifest_lies: 150}),
    "package .onnx": Kind(_package(".onnx"), _answers, True, {bits: 120, spans: 80}),
    "package .onnx, lies": Kind(_package(".onnx"), _answers, False, {metadata_lies: 150}),
    "outputs": Kind(_make_outputs, lambda path: _values(exitkit.ExitOutputs.load(path)), True, {bits: 200, spans: 100}),
    "regression": Kind(_make_regression, lambda path: _values(RegressionOutputs.load(path)), True, {bits: 100, spans: 60}),
    "config.json": Kind(_make_exits("config.json"), _read_exits, True, {bits: 40, spans: 20}),
    "config.json, lies": Kind(_make_exits("config.json"), _read_exits, False, {config_lies: 40}),
    "exits": Kind(_make_exits("exits-*.safetensors"), _read_exits, True, {bits: 40, spans: 20}),
    "checkpoint": Kind(
        _make_checkpoint,
        lambda path: load_checkpoint(path.parent, {"epochs": 5, "lr": 1e-3}),
        True,
        {bits: 120, spans: 60, entry_bits: 40},
    ),
    "results.json": Kind(_make_run("results.json"), lambda path: read_run(path.parent), False, {bits: 80, json_lies: 150}),
    "thresholds.json": Kind(_make_run("thresholds.json"), _read_thresholds, True, {bits: 120, spans: 40}),
    "thresholds.json, lies": Kind(_make_run("thresholds.json"), _read_thresholds, False, {json_lies: 150}),
    "samples.json": Kind(_make_run("samples.json"), lambda path: read_run(path.parent), False, {bits: 80, json_lies: 120}),
    "recipe": Kind(_make_recipe, lambda path: read_recipe(path, {}), False, {bits: 80, spans: 40, toml_lies: 200}),
    ".npz": Kind(_make_npz, read_npz, False, {bits: 100, spans: 60, entry_bits: 40}),
    "image": Kind(_make_image, lambda path: opened_image(str(path)), False, {bits: 80, spans: 60}),
    "table": Kind(_make_table, _read_table, False, {bits: 60, spans: 60}),
}  # fmt: skip


def test_there_are_enough_mutations() -> None:
    assert sum(sum(kind.changes.values()) for kind in KINDS.values()) >= 2000


@pytest.mark.parametrize("name", KINDS)
def test_damage_and_lies(name: str, tmp_path: Path) -> None:
    if "onnx" in name:
        pytest.importorskip("onnxruntime")
    kind = KINDS[name]
    chance = random.Random(f"exitkit {name}")
    path = kind.make(tmp_path)
    sound, before = path.read_bytes(), kind.read(path)
    faults = []
    for change, count in kind.changes.items():
        for number in range(count):
            damaged = change(sound, chance)
            path.write_bytes(damaged)
            fault = fault_of(kind, path, before) if damaged != sound else None
            if fault is not None:
                faults.append(f"{change.__name__} {number}: {fault}")
    assert faults == []


def fault_of(kind: Kind, path: Path, before: Any) -> str | None:
    """What is wrong with how a damaged file was taken; None where nothing is."""
    try:
        with _limited():
            after = kind.read(path)
    except ExitkitError as error:
        return None if 0 < len(str(error)) < 1500 else f"an error of {len(str(error))} characters"
    except _TooLongError:
        return f"still reading after {_SECONDS} s"
    except BaseException as error:
        return f"raw {type(error).__name__}: {str(error)[:120]}"
    return f"accepted, with other content: {str(after)[:120]}" if kind.exact and not _same(before, after) else None


class _TooLongError(BaseException):
    pass


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLongError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def test_the_oracle_notices_damage(tmp_path: Path) -> None:
    """What this file tests with can fail: outputs written without a digest, a changed number, and it is seen."""
    path = _make_outputs(tmp_path)
    before = _values(exitkit.ExitOutputs.load(path))
    outputs = _outputs()
    tensors = {"log_probs": outputs.log_probs.flip(0).contiguous(), "macs": outputs.macs}
    save_file(tensors, path, metadata={"format": "exitkit-outputs-1", "backbone_macs": "4.0"})
    fault = fault_of(KINDS["outputs"], path, before)
    assert fault is not None
    assert "accepted" in fault
