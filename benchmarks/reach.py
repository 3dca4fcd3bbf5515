"""How far surgery reaches: every model of a library, attached, partition, and compared with eager.

    python benchmarks/reach.py torchvision            # all classification models, of videos too
    python benchmarks/reach.py timm                   # one model of every model file, the smallest
    python benchmarks/reach.py timm --long            # every architecture under 60M parameters (hours)
    python benchmarks/reach.py hf                     # every text, image, audio and video classifier, tiny
    python benchmarks/reach.py all --workers 8 --resume

Weights are random and the inputs are those exitkit infers. Every model gets an exit after every block but the last; its
stages, joined again, are compared with the model itself on inputs that surgery never saw, at batch sizes 1 and 3. Each
model runs in a process of its own under a time limit. Rows of other models in the output file are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from reach_models import FAMILIES, build, family_of, inputs_of, names_of
from rich.table import Table
from tables import table, write
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import exitkit
from exitkit.common.console import make_console
from exitkit.surgery.capturing import logits_of
from exitkit.surgery.default_inputs import example_for
from exitkit.surgery.inputs import Example, call_on

_PRELOADED = ["exitkit", "torchvision", "timm", "transformers"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("torchvision", "timm", "hf", "all"))
    parser.add_argument("--long", action="store_true", help="timm: every architecture under 60M parameters")
    parser.add_argument("--out", type=Path, default=Path("results/reach.json"))
    parser.add_argument("--only", nargs="+", default=[""], help="models whose name contains one of these")
    parser.add_argument("--resume", action="store_true", help="leave out models that the output file has a row for")
    parser.add_argument("--workers", type=int, default=1, help="models measured at the same time")
    parser.add_argument("--limit", type=float, default=900, help="seconds per model")
    args = parser.parse_args()
    console = make_console()
    rows = {row["model"]: row for row in json.loads(args.out.read_text())["models"]} if args.out.exists() else {}
    libraries = ("torchvision", "timm", "hf") if args.library == "all" else (args.library,)
    names = [name for library in libraries for name in names_of(library, args.long, args.out.parent / "timm.json")]
    names = [name for name in names if any(part in name for part in args.only)]
    pending = [name for name in names if not (args.resume and name in rows)]
    threads = max(1, torch.get_num_threads() // args.workers)
    with ThreadPoolExecutor(args.workers) as pool:
        for done in as_completed([pool.submit(_in_own_process, name, args.limit, threads) for name in pending]):
            row = done.result()
            rows[row["model"]] = row
            console.print(_line(row), soft_wrap=True, highlight=False, markup=False)
            write(args.out, args, models=list(rows.values()))
    console.print(_summary(list(rows.values())))


def _in_own_process(name: str, limit: float, threads: int) -> dict[str, Any]:
    """The row of a model, from a process that cannot take the others with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_send_row, args=(name, threads, sender))
    worker.start()
    sender.close()
    row = {"model": name, "family": family_of(name)}
    try:
        return receiver.recv() if receiver.poll(limit) else row | {"crashed": f"no answer within {limit:.0f} s"}
    except EOFError:
        worker.join()
        return row | {"crashed": f"the process ended with exit code {worker.exitcode} (out of memory?)"}
    finally:
        worker.kill()
        worker.join()


def _send_row(name: str, threads: int, sender: Connection) -> None:
    torch.set_num_threads(threads)
    sender.send(measure(name))


def measure(name: str) -> dict[str, Any]:
    """One row: what was found and how exact it is, or why it was refused; a bare traceback is a finding of its own."""
    row: dict[str, Any] = {"model": name, "family": family_of(name)}
    try:
        model, inputs = build(name), inputs_of(name)
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        return row | _measure_exits(_calibrated(model, inputs), inputs)
    except exitkit.ExitkitError as error:
        return row | {"refused": str(error)}
    except ImportError as error:  # natten, detectron2
        return row | {"skipped": " ".join(str(error).split())[:200]}
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return row | {"crashed": f"{message} ({frame.filename}:{frame.lineno} in {frame.name})"}


def _calibrated(model: nn.Module, inputs: Any) -> nn.Module:
    """Each BatchNorm given the statistics of the example: with those of a new model, signals die out or overflow."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        example = example_for(model, inputs)
        with torch.no_grad():
            call_on(model, example.spec.batch(example.tensors))
    return model.eval()


def _measure_exits(model: nn.Module, inputs: Any) -> dict[str, Any]:
    torch.backends.mha.set_fastpath_enabled(False)  # a fused kernel that rounds differently (1e-6)
    started = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        ee = exitkit.attach(model, inputs, every=1, method="sdn", head="1L")
    except exitkit.ExitkitError as error:
        found["not_every_block"] = str(error)
        names = [boundary.name for boundary in exitkit.inspect(model, inputs, show=False).boundaries]
        ee = exitkit.attach(model, inputs, at=[names[len(names) // 2]], method="sdn", head="1L")
    attached = time.perf_counter()
    partition = ee.partition()
    captured = time.perf_counter()
    gaps, spreads = [], []
    for size in (1, 3):
        tensors = _unseen(ee.example, size)
        copies = tuple(tensor.clone() for tensor in tensors)  # a model may write into its inputs
        with torch.no_grad():
            eager = logits_of(call_on(model, ee.example.spec.batch(copies)))
            gaps.append((eager - partition.run(tensors)[-1]).abs().max().item())
        spreads.append((eager - eager[:1]).abs().max().item())
    return found | {
        "boundaries": len(ee.anatomy.boundaries),
        "blocks": len(ee.anatomy.blocks),
        "exits": len(ee.boundaries),
        "live": max(len(stage.live) for stage in partition.stages[:-1]),
        "largest_difference": max(gaps),
        "spread": max(spreads),
        "attach_seconds": round(attached - started, 1),
        "capture_seconds": round(captured - attached, 1),
    }


def _unseen(example: Example, size: int) -> tuple[Tensor, ...]:
    """Other inputs of the same kind: new random values, or the tokens between the first and last in reverse."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else torch.cat([tensor[:, :1], tensor[:, 1:-1].flip(1), tensor[:, -1:]], 1)
        for tensor in example.with_batch(size).tensors
    )


def _line(row: dict[str, Any]) -> str:
    reason = next((f"{key}: {row[key]}" for key in ("refused", "crashed", "skipped") if key in row), None)
    return f"{row['model']:<45} " + (
        reason
        or f"{row['blocks']} blocks, {row['boundaries']} boundaries, {row['live']} live, off by "
        f"{row['largest_difference']:.0e} of {row['spread']:.0e}, {row['attach_seconds']} s"
    )


def _summary(models: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for family in FAMILIES:
        own = [row for row in models if row["family"] == family]
        measured = [row for row in own if "blocks" in row]
        exact = [row for row in measured if row["largest_difference"] == 0]
        counts = [len(own), len(exact), sum(row["blocks"] >= 4 for row in exact), len(measured) - len(exact)]
        counts += [sum(key in row for row in own) for key in ("refused", "crashed", "skipped")]
        if own:
            rows.append((family, *map(str, counts)))
    headings = ("family", "models", "exact", "4 blocks or more", "different", "refused", "crashed", "skipped")
    return table(headings, rows, f"torch {torch.__version__}")


if __name__ == "__main__":
    main()
