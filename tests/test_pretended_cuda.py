"""The CUDA engine against a CUDA runtime that is only pretended: what crashes, waits, launches and holds memory.

Needs no GPU but a CUDA build of torch: ``bash benchmarks/gpu/pretended/setup.sh FOLDER`` makes one (several GB), and
``EXITKIT_PRETENDED_CUDA=FOLDER/python`` names it. Kernels do nothing there, so answers mean nothing, and how many samples go
on is written where the device would have put it. A call that is illegal while a graph is recorded is reported on stderr, and
fails every test here.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks/gpu")])
PYTHON = os.environ.get("EXITKIT_PRETENDED_CUDA", "")

pytestmark = [
    pytest.mark.pretended_cuda,
    pytest.mark.skipif(
        not PYTHON,
        reason="EXITKIT_PRETENDED_CUDA names no interpreter; benchmarks/gpu/pretended/setup.sh makes one",
    ),
]

_PRELUDE = """
import os, sys, threading, warnings
from dataclasses import replace
import torch
import exitkit
from counting import counted, prepare
from exitkit.engine.compiling import fastest
from exitkit.packages import exporting
prepare()
exporting._compare = lambda *_: None  # kernels do nothing
PACKAGE = sys.argv[1]
def images(samples, device="cuda"):
    return torch.zeros(samples, 1, 8, 8, device=device)
def refused(words, run):
    try:
        run()
    except exitkit.ArgumentError as error:
        assert words in str(error), error
        assert len(str(error).splitlines()) <= 2
    else:
        raise AssertionError(f"nothing was said of {words!r}")
def going_on(engine, *counts):
    "As if so many samples went on at each exit. Recorded copies do not run again, so this stays."
    for one in engine.loop.graphs.recordings.values():
        for boundary, count in zip(one.boundaries[1:], counts):
            with torch.inference_mode():
                boundary.on_host.fill_(count)
def loaded(device="cuda"):
    return exitkit.load(PACKAGE, device=device, trust=True)
"""


def run(script: str, package: Path | str, **environment: str) -> str:
    """Run a script; nothing that is illegal while a graph is recorded may happen."""
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", _PRELUDE + script, str(package)],
        env=os.environ | {"PYTHONPATH": PATH} | environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "CAPTURE VIOLATION" not in done.stderr, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small net with two exits, compiled for the GPU."""
    path = tmp_path_factory.mktemp("pretended") / "tiny.pt2"
    run(
        """
from tests.toy import TinyNet
ee = exitkit.attach(TinyNet().eval(), images(2, "cpu"), at=["blocks.0", "blocks.2"], method="ztw", head="1L")
exitkit.export(ee.cuda(), PACKAGE, 0.5, optimize=True)
""",
        path,
    )
    return path


def test_every_step_is_recorded_once_for_each_of_a_dozen_sizes(package: Path) -> None:
    """AOTInductor's default runner asks an event whether it is done, which is illegal in a recording; 42 sizes with memory of
    their own wanted 56 GB; kernels were compiled for every size. `load(device="cuda")` refused every input.
    """
    run(
        """
from exitkit.engine.cuda import kernels
engine = loaded("cuda")
assert str(engine.inputs.device) == "cuda:0"
warm = lambda: engine.warm(images(2))
assert counted(lambda: engine.warm(images(2), [256]))["captures"] == 3
largest = torch.cuda.memory_reserved()
assert counted(warm)["captures"] == 11 * 3
assert torch.cuda.memory_reserved() <= largest + (8 << 20), (torch.cuda.memory_reserved(), largest)
again = counted(warm)
assert again["captures"] == again["mallocs"] == again["syncs"] == 0, again
binaries = lambda kernel: len(kernel.device_caches[0][0])
assert binaries(kernels._decide_kernel) == 1, binaries(kernels._decide_kernel)
assert binaries(kernels._compact_kernel) <= 4
before = binaries(kernels._compact_kernel)
for size in (1, 3, 100, 256, 300):
    second = counted(lambda: engine(images(size)))
    assert second["captures"] == 0 and second["mallocs"] <= 1, second
assert binaries(kernels._compact_kernel) == before
assert len(engine(images(300)).exit) == 300
""",
        package,
    )


def test_the_host_waits_once_for_a_decision_and_for_no_other_step(package: Path) -> None:
    """A call of four steps waited ten times for three decisions."""
    run(
        """
engine = loaded()
engine.warm(images(2))
x = images(64)
going_on(engine, 20, 5)
made = counted(lambda: engine(x))
assert (made["syncs"], made["graph_launches"]) == (2, 3), made
going_on(engine, 0, 0)
made = counted(lambda: engine(x))
assert (made["syncs"], made["graph_launches"]) == (1, 1), made
going_on(engine, 20, 5)
for waits, expected in (((False, True), 1), ((False, False), 0)):
    patient = replace(engine, loop=engine.loop.waiting(waits))
    patient(x)
    made = counted(lambda: patient(x))
    assert (made["syncs"], made["graph_launches"]) == (expected, 3), made
assert made["memcpys"] <= 5 and made["launches"] <= 3, made  # the batch in, the answers out
program = engine.loop.program
stage = lambda *values: program.steps[0].run(*values)[:-2]
bare = replace(program, steps=(replace(program.steps[0], run=stage, decides=False), *program.steps[1:]))
bare = replace(engine, loop=replace(engine.loop, program=bare))
bare(x)
made = counted(lambda: bare(x))
assert (made["syncs"], made["graph_launches"]) == (1, 3), made
""",
        package,
    )


def test_map_answers_full_batches_by_recordings(package: Path) -> None:
    """64 batches waited 839 times, and each of their steps launched its kernels one by one."""
    run(
        """
engine = loaded()
engine.warm(images(2))
going_on(engine, 20, 5)
made = counted(lambda: list(engine.map([images(16)] * 64, batch_size=64)))
assert made["graph_launches"] == 16 * 3, made
assert made["syncs"] <= 16 * (2 + 1), made  # a decision each but the last, and the answers to the host
""",
        package,
    )


def test_threads_serve_and_pin_memory_while_another_records(package: Path) -> None:
    """In the mode "global" any call of another thread broke a recording; buffers were shared by streams without order.

    Random numbers are refused to others in the moment in which a recording begins, and drawn in all others.
    """
    run(
        """
engine = loaded()
fresh = replace(engine, loop=fastest(engine.loop.program, engine.policy))
errors, refusals, draws, stop = [], [], [], threading.Event()
def draw():
    draws.append(1)
    try:
        torch.rand(3, device="cuda")
    except RuntimeError as error:
        assert "Offset increment outside graph capture" in str(error), error
        refusals.append(error)
def serve():
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                assert len(engine(images(8)).exit) == 8
                draw()
    except BaseException as error:
        errors.append(error)
def pin():
    kept = []
    while not stop.is_set():
        kept = [*kept[-50:], torch.empty(1 << 16, pin_memory=True)]
threads = [threading.Thread(target=one) for one in (serve, serve, pin)]
for thread in threads: thread.start()
try:
    fresh.warm(images(2), [1, 2, 4, 8, 16, 32])
finally:
    stop.set()
    for thread in threads: thread.join()
assert not errors, errors
assert len(refusals) < len(draws) / 2, (len(refusals), len(draws))
assert torch.cuda.current_stream() == torch.cuda.default_stream()
""",
        package,
    )


def test_streams_wait_for_each_other(package: Path) -> None:
    """By torch's own sanitizer. τ was still being zeroed on the stream that made the engine when a call on another set it."""
    run(
        """
from torch.cuda import _sanitizer
_sanitizer.enable_cuda_sanitizer()
engine = loaded()
side, x = torch.cuda.Stream(), images(16)
side.wait_stream(torch.cuda.current_stream())
engine = replace(engine, loop=fastest(engine.loop.program, engine.policy))
for stream in (side, torch.cuda.default_stream(), side):
    with torch.cuda.stream(stream):
        for tau in (0.5, 0.1):
            engine.at(tau)(x[:9])
            engine(x)
        list(engine.map([x] * 5, 40))
""",
        package,
    )


def test_batches_are_fetched_on_the_callers_stream_and_device(package: Path) -> None:
    """The thread that fetches them had the default stream, which no other one waits for, and the first device."""
    run(
        """
engine, seen = loaded("cuda:1"), []
def batches():
    for _ in range(3):
        seen.append(torch.cuda.current_stream())
        yield images(4, "cuda")
with torch.cuda.device(1):
    side = torch.cuda.Stream()
with torch.cuda.stream(side):
    assert len(list(engine.map(batches(), 8, max_wait=5.0))) == 3
assert seen == [side] * 3, seen
""",
        package,
        FAKE_DEVICES="2",
    )


def test_a_server_runs_on_the_stream_that_requests_are_made_on(package: Path) -> None:
    """Its thread had the default stream, which does not wait for another, on which a request may still be copied."""
    run(
        """
import asyncio
from exitkit.serving.scheduling import RequestScheduler
engine, seen = loaded(), []
program = engine.loop.program
def noted(*values):
    seen.append(torch.cuda.current_stream())
    return program.steps[0].run(*values)
steps = (replace(program.steps[0], run=noted), *program.steps[1:])
engine = replace(engine, loop=fastest(replace(program, steps=steps), engine.policy))
async def serve():
    scheduler = RequestScheduler(engine, max_wait_ms=0)
    assert len((await scheduler.answer(images(4))).exit) == 4
    await scheduler.close()
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    asyncio.run(serve())
assert seen[0] == side, seen
""",
        package,
    )


def test_other_engines_leave_a_recording_under_way_alone(package: Path) -> None:
    """To wait for the whole device breaks it, and so does an old recording that Python's collector destroys in its thread."""
    run(
        """
import gc
from exitkit.engine.cuda.recorder import Recorder
engine = loaded()
engine(images(64))
class Garbage:
    def __init__(self):
        self.itself = self
    def __del__(self):
        found.append(torch.cuda.is_current_stream_capturing())
found, inside, shrunk, x = [], threading.Event(), threading.Event(), images(1)
def step():
    x.add_(1)
    Garbage()
    kept = [[] for _ in range(10_000)]  # by which the collector would run
    inside.set()
    assert shrunk.wait(60)
record = Recorder(torch.device("cuda", 0))
thread = threading.Thread(target=record, args=(step,))
thread.start()
assert inside.wait(60)
engine.loop.graphs.shrink(64)
shrunk.set()
thread.join()
assert gc.isenabled()
gc.collect()
assert found == [False], found
assert len(engine(images(64)).exit) == 64
""",
        package,
    )


def test_memory_that_does_not_suffice_halves_the_batch_wherever_it_ends() -> None:
    """AOTInductor's plain RuntimeError hid it, and a failed recording left thread and allocator in the middle of it."""
    run(
        """
import ctypes, gc
from torch import nn
held = ctypes.c_long.in_dll(ctypes.CDLL(None), "fake_bytes")
wide, narrow = nn.Sequential(nn.Linear(64, 1 << 15), nn.Tanh()), nn.Sequential(nn.Linear(1 << 15, 64), nn.Tanh())
net = nn.Sequential(wide, narrow, nn.Linear(64, 4)).eval()
ee = exitkit.attach(net, torch.zeros(2, 64), at=["0"], method="sdn", head="1L").cuda()
compiled = exitkit.compile(ee, 0.5, optimize=True)
x = torch.zeros(256, 64, device="cuda")
ends = []
for more in range(0, 300, 20):
    engine = None
    gc.collect(); torch.cuda.empty_cache()
    engine = replace(compiled, loop=fastest(compiled.loop.program, compiled.policy))
    os.environ["FAKE_LIMIT"] = str(held.value + (more << 20))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            assert len(engine(x).exit) == len(engine(x).exit) == 256
            ends.append(engine.loop.largest)
        except torch.OutOfMemoryError:
            ends.append(0)
    del os.environ["FAKE_LIMIT"]
    said = [str(one.message) for one in found if "memory" in str(one.message)]
    assert ends[-1] == 0 or len(said) == (ends[-1] < 256), said
    assert not any("replayed" in str(one.message) for one in found)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(3, device="cuda").shape == (3,)
    assert len(engine(x).exit) == 256
    assert counted(lambda: engine(x))["captures"] == 0
assert ends == sorted(ends) and ends[-1] == 256 and len(set(ends) - {0, 256}) >= 2, ends
""",
        "none",
    )


def test_a_compiled_step_says_when_memory_does_not_suffice(package: Path) -> None:
    """As torch does, so that `map` and steps that are not recorded are answered in parts too."""
    run(
        """
import ctypes
engine = loaded()
step, x = engine.loop.program.steps[0].run, images(256)
step(images(1))
torch.cuda.empty_cache()
os.environ["FAKE_LIMIT"] = str(ctypes.c_long.in_dll(ctypes.CDLL(None), "fake_bytes").value)
try:
    step(torch.as_strided(x, (100_000, 1, 8, 8), (0, 64, 8, 1)))
except torch.OutOfMemoryError:
    pass
else:
    raise AssertionError
del os.environ["FAKE_LIMIT"]
step(x)
""",
        package,
    )


def test_what_breaks_a_recording_leaves_torch_as_it_was(package: Path) -> None:
    """A step that waits for the device invalidates the recording: random numbers and the allocator then stayed in it."""
    done = subprocess.run(
        [
            PYTHON,
            "-W",
            "ignore",
            "-c",
            _PRELUDE
            + """
from exitkit.engine.cuda.recorder import Recorder, UnrecordableError
engine = loaded()
program = engine.loop.program
def waits(*values):
    made = program.steps[0].run(*values)
    torch.cuda.synchronize()
    return made
steps = (replace(program.steps[0], run=waits), *program.steps[1:])
engine = replace(engine, loop=fastest(replace(program, steps=steps), engine.policy))
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    for size in (8, 9, 8, 8):
        assert len(engine(images(size)).exit) == size
assert sum("replayed from CUDA graphs" in str(one.message) for one in found) == 1
assert torch.rand(3, device="cuda").shape == (3,)
record = Recorder(torch.device("cuda", 0))
def fails():
    torch.zeros(1 << 24, device="cuda")
    raise torch.OutOfMemoryError("made up")
for error in (torch.OutOfMemoryError, UnrecordableError):
    try:
        record(fails if error is torch.OutOfMemoryError else torch.cuda.synchronize)
    except error:
        pass
    torch.cuda.empty_cache()
    kept = torch.cuda.memory_reserved()
    again = record(lambda: torch.zeros(1 << 20, device="cuda").add_(1))
    again()
    del again
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= kept, (torch.cuda.memory_reserved(), kept)
print("sound")
""",
            str(package),
        ],
        env=os.environ | {"PYTHONPATH": PATH},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "sound", done.stderr[-4000:]
    assert done.stderr.count("CAPTURE VIOLATION") == 4  # three calls tried to record, and the recorder itself


def test_on_the_second_device_while_the_first_is_the_current_one(package: Path) -> None:
    """Weights, streams, events, Triton and recordings followed the current device."""
    run(
        """
engine = loaded("cuda:1")
torch.cuda.synchronize(1)
with torch.cuda.device(1):
    stream = torch.cuda.Stream()
for _ in range(2):
    engine.warm(images(2, "cuda:1"), [4])
    with torch.cuda.stream(stream):
        pass
    assert {column.device.index for column in engine(images(4, "cuda:1"))} == {1}
    assert len(list(engine.map([images(4, "cuda:1")] * 3, 8))) == 3
assert torch.cuda.current_device() == 0
assert torch.cuda.memory_reserved(0) == 0
refused("on cuda:1", lambda: engine(images(4, "cuda:0")))
refused("cuda:2", lambda: loaded("cuda:2"))
""",
        package,
        FAKE_DEVICES="2",
    )


def test_bad_input_is_one_clear_error_and_the_engine_usable(package: Path) -> None:
    run(
        """
engine = loaded()
refused("does not exist", lambda: loaded("cuda:7"))
refused("compiled for cuda", lambda: loaded("cpu"))
refused("on cuda:0", lambda: engine(images(4, "cpu")))
refused("sizes", lambda: engine.warm(images(4), [0]))
capability = torch.cuda.get_device_capability
torch.cuda.get_device_capability = lambda device=None: (8, 0)
refused("capability 9.0", loaded)
torch.cuda.get_device_capability = capability
side = torch.cuda.Stream()
engine(images(4))
graph = torch.cuda.CUDAGraph()
with torch.cuda.stream(side):
    graph.capture_begin()
    refused("cannot be recorded", lambda: engine(images(4)))
    graph.capture_end()
child = os.fork()
if not child:
    try:
        refused("spawn", lambda: engine(images(4, "cpu")))
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
with torch.cuda.stream(side):
    assert len(engine(images(4)).exit) == 4
assert len(engine(images(4)).exit) == 4
""",
        package,
    )


def test_samples_of_several_rows() -> None:
    """Values with several rows for a sample were cut to one (TNT of timm)."""
    run(
        """
import timm
tnt = timm.create_model("tnt_s_patch16_224", num_classes=4, img_size=32, depth=2).eval()
ee = exitkit.attach(tnt, torch.zeros(2, 3, 32, 32), at_cost=[0.5], head="1L", method="sdn").cuda()
engine = exitkit.compile(ee, 0.5, optimize=True)
x = torch.zeros(8, 3, 32, 32, device="cuda")
engine(x)
slots = next(iter(engine.loop.graphs.recordings.values())).boundaries[1].slots
assert {slot.view(5).shape[0] for slot in slots.values()} == {5, 5 * 4}, {n: s.view(5).shape for n, s in slots.items()}
going_on(engine, 3)
made = counted(lambda: engine(x))
assert (made["graph_launches"], made["syncs"]) == (1 + 1, 1), made
""",
        "none",
    )


def test_elements_are_counted_in_64_bits_where_a_full_batch_needs_it() -> None:
    """32 bits were chosen from a hint of three samples, and would have written elsewhere from some 2,700 on."""
    run(
        """
from torch._inductor.codegen.simd import SIMDScheduling
from torch import nn
found = []
choose = SIMDScheduling.can_use_32bit_indexing
SIMDScheduling.can_use_32bit_indexing = staticmethod(lambda *args: found.append(choose(*args)) or found[-1])
class Wide(nn.Module):
    def __init__(self, side):
        super().__init__()
        self.side, self.first, self.second = side, nn.Linear(2, 2), nn.Linear(2, 2)
        self.last = nn.Linear(2, 2)
    def forward(self, x):
        wide = self.first(x).unsqueeze(1).unsqueeze(1).expand(-1, self.side, self.side, -1).sin()
        return self.last(self.second(torch.cumsum(wide, 1).flatten(1, 2).mean(1)))
for side, fits in ((8, True), (2100, False)):
    found.clear()
    torch._dynamo.reset()
    ee = exitkit.attach(Wide(side).eval(), torch.zeros(3, 2), at=["second"], method="sdn", head="1L").cuda()
    exitkit.compile(ee, 0.5, optimize=True)
    assert all(found) == fits and found, (side, found)
""",
        "none",
    )
