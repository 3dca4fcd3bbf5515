"""The first minutes on a real GPU: is the CUDA engine correct, safe, and what does it cost?

    python benchmarks/gpu/first_contact.py env|kernels|engine|safety|package|cost [model ...]

One part at a time, in this order, each under ten minutes; stop at the first that fails. Needs exitkit, torchvision, timm and
transformers; nothing is downloaded. Prints a line for every check, and at the end a summary to be pasted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agreement import agreement, mapped_beside, same, same_and_lasting, served
from models import GPU, Make, attached, cases, engines, images
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import exitkit
from exitkit.surgery.inputs import call_on

SIZES = (1, 2, 3, 64, 7, 8, 9, 33, 100, 255, 256, 257, 5, 64, 1)
"""Batches that meet many buckets, in an order that replays over old data."""
summary: list[str] = []


@contextmanager
def check(name: str) -> Iterator[None]:
    """A check that passes or fails, and is timed; the next one still runs."""
    started = time.monotonic()
    try:
        yield
        torch.cuda.synchronize()
        say(f"PASS {name} ({time.monotonic() - started:.1f} s)")
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        say(f"FAIL {name}: {type(error).__name__}: {str(error)[:300]} at {where}")


def say(line: str) -> None:
    summary.append(line)
    print(line, flush=True)


def env() -> None:
    """What is installed, and whether compiled steps can be built."""
    import triton
    from torch._inductor.cpp_builder import get_cpp_compiler

    from exitkit.engine.cpp_compiler import check_compiler
    from exitkit.engine.cuda import toolchain

    say(f"CUDA {torch.version.cuda}, triton {triton.__version__}, {torch.cuda.device_count()} GPUs")
    with check("headers of CUDA"):
        toolchain.prepare()
    with check("a C++ compiler that torch can live with"):
        check_compiler()
    with check("it links against libcuda"), tempfile.TemporaryDirectory() as folder:
        build = [get_cpp_compiler(), "-x", "c++", "-", "-lcuda", "-o", f"{folder}/a.out"]
        subprocess.run(build, input=b"int main() {}", check=True, capture_output=True)
    with check("copies in memory"):
        x = torch.empty(1 << 28, device=GPU)
        y = torch.empty_like(x)
        say(f"     {2 * x.nbytes / milliseconds(lambda: y.copy_(x)) / 1e9:.2f} TB/s")


def kernels() -> None:
    """The kernels against plain torch, on the GPU."""
    from exitkit.engine.cuda import kernels as triton_kernels
    from exitkit.engine.cuda import reference

    with check("decide and compact as plain torch, 1 to 256 samples, every kind of element"):
        for size in range(1, 257):
            _same_decisions((triton_kernels, reference), size)


def _same_decisions(modules: tuple[Any, Any], size: int) -> None:
    from exitkit.engine.cuda.buffers import Boundary, Results

    random = torch.Generator().manual_seed(size)
    classes = 1 + int(torch.randint(1500, (1,), generator=random))
    score = torch.rand(size, generator=random, dtype=torch.float64)
    score[torch.rand(size, generator=random) < 0.1] = float("nan")
    samples = int(torch.randint(size + 1, (1,), generator=random))
    taus = (0.5, float("inf"), float("-inf"), float(score[0].nan_to_num(0.3)))
    answer = torch.randn(size, classes, generator=random).to([torch.float32, torch.bfloat16][size % 2])
    shape = [(3, 7, 50), (5,), (197, 3), (1,)][size % 4]
    value = torch.randn(size, *shape, generator=random).to([torch.float32, torch.bfloat16, torch.bool][size % 3])
    found = []
    for module in modules:
        here, there = Boundary.empty(256, GPU), Boundary.empty(256, GPU)
        here.count.fill_(samples)
        results = Results.empty(classes, torch.float32, 256, GPU)
        target = torch.zeros(256 * value[0].numel(), dtype=value.dtype, device=GPU)
        tau = torch.tensor([taus[size % 4]], dtype=torch.float64, device=GPU)
        module.decide(score.to(GPU), answer.to(GPU), tau, 3, here, there, results, size % 7 == 6)
        module.compact(value.to(GPU).flatten(), target, size, there)
        columns = (there.count, there.rows, there.faulty, there.keep, target, *results)
        found.append([column.double().nan_to_num(9, 8, 7).cpu() for column in columns])
    for place, (one, other) in enumerate(zip(*found, strict=True)):
        assert torch.equal(one, other), (size, place)


def engine() -> None:
    """The engine against plain torch at every kind of size; answers that outlive the next call; ``map``; a server."""
    for name, model, make, dtype in cases(sys.argv[2:]):
        pair = None
        with check(f"{name}: attached and compiled"):
            pair = engines(model, make, dtype)
        if pair is not None:
            _compared(name, *pair, make, 1e-2 if dtype == torch.float32 else 5e-2)


def _compared(name: str, plain: exitkit.Engine, fast: exitkit.Engine, make: Make, tolerance: float) -> None:
    with check(f"{name}: {len(SIZES)} batches as plain torch"):
        for size in SIZES:
            same_and_lasting(plain, fast, make, size, tolerance)
    batches = [make(size) for size in (16, 3, 64, 1, 40)]
    with check(f"{name}: map"):
        for got, batch in zip(fast.map(batches, 64), batches, strict=True):
            same(got, call_on(plain, batch), plain, tolerance)
    with check(f"{name}: map that waits for nothing, on a stream of its own"):
        mapped_beside(plain, fast, batches, tolerance)
    with check(f"{name}: requests to a server, on a stream of its own"):
        served(plain, fast, [make(size) for size in (1, 3, 1, 9)], tolerance)


def safety() -> None:
    """Threads, streams, pinned memory, memory that does not suffice, memory formats, a second GPU."""
    import torchvision

    make = partial(images, 64, torch.float32)
    with check("compiled"):
        plain, fast = engines(torchvision.models.resnet18(num_classes=10), make, torch.float32)
    batch = make(64)
    expected = plain(batch)
    fast(batch)
    with check("memory that does not suffice for 256: smaller recordings, one warning, answers all the same"):
        _without_memory(fast, batch, expected)
    with check("two threads serve on streams of their own and one pins memory while another records"):
        _whileserved(fast, batch, expected)
    with check("the current stream is the default one"):
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    with check("channels_last, strided and odd-offset inputs"):
        for given in (batch.contiguous(memory_format=torch.channels_last), batch[::2], batch[1:34]):
            assert agreement(fast(given), plain(given)) > 0.9
    if torch.cuda.device_count() > 1:
        with check("on the second GPU while the first is the current one"):
            second = partial(images, 64, torch.float32, device=torch.device("cuda", 1))
            plain, fast = engines(torchvision.models.resnet18(num_classes=10), second, torch.float32)
            for batch in (second(1), second(64)):
                same(fast(batch), plain(batch), plain, 1e-2)


def _whileserved(fast: exitkit.Engine, batch: Tensor, expected: exitkit.Prediction) -> None:
    errors: list[BaseException] = []
    stop = threading.Event()

    def serve() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set():
                    assert agreement(fast(batch), expected) > 0.9
        except BaseException as error:
            errors.append(error)

    def pin() -> None:
        kept: list[Tensor] = []
        while not stop.is_set():
            kept = [*kept[-50:], torch.empty(1 << 16, pin_memory=True)]

    threads = [threading.Thread(target=target) for target in (serve, serve, pin)]
    for thread in threads:
        thread.start()
    try:
        for size in (2, 3, 5, 9, 12, 20, 40, 72, 80, 100, 150, 200):
            fast(batch[:1].expand(size, -1, -1, -1).contiguous())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def _without_memory(fast: exitkit.Engine, batch: Tensor, expected: exitkit.Prediction) -> None:
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.empty_cache()
    many = batch.repeat(4, 1, 1, 1)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**24) / total)
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert agreement(fast(many), expected._replace(exit=expected.exit.repeat(4))) > 0.9
        say(f"     warnings: {[str(one.message)[:90] for one in found]}")
        assert len(found) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert agreement(fast(batch), expected) > 0.9
    torch.rand(3, device=GPU)


def package() -> None:
    """Packages on both kinds of device."""
    import torchvision

    make = partial(images, 64, torch.float32)
    plain, _ = engines(torchvision.models.resnet18(num_classes=10), make, torch.float32, optimize=False)
    ee = attached(torchvision.models.resnet18(num_classes=10), make, torch.float32)
    batch = make(33)
    plain = exitkit.compile(ee, plain.thresholds)
    with tempfile.TemporaryDirectory() as folder:
        for optimize in (False, True):
            path = Path(folder) / f"{optimize}.pt2"
            with check(f"package, optimize={optimize}: written"):
                exitkit.export(ee, path, list(plain.thresholds), optimize=optimize)
            for device in ("cuda", "cuda:0", None if optimize else "cpu"):
                with check(f"package, optimize={optimize}: device={device!r}"):
                    loaded = exitkit.load(path, device=device, trust=True)
                    assert isinstance(loaded, exitkit.Engine)
                    got = loaded(batch.to(loaded.inputs.device))
                    same(exitkit.Prediction(*(column.to(GPU) for column in got)), plain(batch), plain, 1e-2)


def cost() -> None:
    """What a call issues, waits for and takes, and what recordings hold: ViT-B in bfloat16, three exits."""
    import timm

    make = partial(images, 224, torch.bfloat16)
    plain, fast = engines(timm.create_model("vit_base_patch16_224"), make, torch.bfloat16)
    before = torch.cuda.memory_reserved()
    with check("every batch size recorded"):
        fast.warm(make(1))
    say(f"     {(torch.cuda.memory_reserved() - before) / 2**30:.2f} GiB reserved by recordings")
    for size in (1, 32, 256):
        batch = make(size)
        fast(batch)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            fast(batch)
            torch.cuda.synchronize()
        calls = {event.key: event.count for event in seen.key_averages() if event.key.startswith("cuda")}
        say(f"     batch {size}: {calls}")
        ways: list[Callable[[], Any]] = [partial(plain, batch), partial(fast, batch)]
        eager, own = (milliseconds(way) for way in ways)
        whole = milliseconds(partial(fast.at(2.0), batch))
        say(f"     batch {size}: ms eager {eager:.3f}, recorded {own:.3f}, recorded and no sample leaves {whole:.3f}")


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """The median of several calls, after three."""
    times = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[3:])


PARTS = {part.__name__: part for part in (env, kernels, engine, safety, package, cost)}


def main() -> None:
    if sys.argv[1:2] not in [[name] for name in PARTS]:
        sys.exit(f"say which part: {', '.join(PARTS)}, in this order")
    say(f"{sys.argv[1:]} on {torch.cuda.get_device_name(GPU)}, torch {torch.__version__}")
    PARTS[sys.argv[1]]()
    print("\n--- summary ---", *summary, sep="\n")
    if any(line.startswith("FAIL") for line in summary):
        sys.exit(1)


if __name__ == "__main__":
    main()
