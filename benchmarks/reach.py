"""How far surgery reaches: every model of a library, attached, lowered, and compared with eager.

    python benchmarks/reach.py torchvision            # all classification models
    python benchmarks/reach.py timm                   # one model of every model file, the smallest by name

Random weights at the model's own input size. ``attach`` itself compares the stages with eager, bit for bit in float32 on a
CPU, at two batch sizes, and refuses what differs; a row is therefore either exact or a refusal with its reason.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import exitkit
from exitkit._torchvision import import_torchvision
from exitkit.cli.bench import machine
from exitkit.cli.sources import load_model
from exitkit.console import make_console
from exitkit.files import replacing

_SMALL = ("atto", "nano", "pico", "femto", "xxs", "xxt", "tiny", "mini", "small", "_s", "xs", "18", "_t", "b0", "0")
_LARGEST = 100_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("torchvision", "timm"))
    parser.add_argument("--out", type=Path, default=Path("results/reach.json"))
    parser.add_argument("--only", help="models whose name contains this")
    args = parser.parse_args()
    console = make_console()
    rows = []
    for name in _names(args.library):
        if args.only is None or args.only in name:
            rows.append(measure(f"{args.library}:{name}"))
            console.print(_line(rows[-1]))
    with replacing(args.out) as temporary:
        temporary.write_text(json.dumps({"about": machine(), "models": rows}, indent=1))
    console.print(_summary(rows))


def measure(name: str) -> dict[str, Any]:
    """Attach one linear exit to the middle block; what was found, or why it was refused."""
    row: dict[str, Any] = {"model": name}
    try:
        model = load_model(name).eval()
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        if row["parameters"] > _LARGEST:
            return row | {"skipped": "over 100M parameters; its smaller siblings run the same code"}
        started = time.perf_counter()
        anatomy = exitkit.inspect(model, show=False).anatomy
        row |= {"boundaries": len(anatomy.boundaries), "blocks": len(anatomy.blocks)}
        middle = anatomy.blocks[(len(anatomy.blocks) - 1) // 2]
        exitkit.attach(model, at=[middle.name], head="1L", method="sdn")
        return row | {"seconds": round(time.perf_counter() - started, 1)}
    except exitkit.ExitkitError as error:
        return row | {"refused": str(error)}
    except Exception as error:  # a bare traceback is a finding of its own
        return row | {"crashed": f"{type(error).__name__}: {error}"[:500]}


def _names(library: str) -> list[str]:
    if library == "torchvision":
        models = import_torchvision("models")
        return list(models.list_models(module=models))
    import timm

    by_file = defaultdict(list)
    for name in timm.list_models():
        by_file[timm.models.model_entrypoint(name).__module__].append(name)
    return sorted(min(names, key=_size_by_name) for names in by_file.values())


def _size_by_name(name: str) -> tuple[int, int, str]:
    rank = next((index for index, mark in enumerate(_SMALL) if mark in name), len(_SMALL))
    return (rank, len(name), name)


def _line(row: dict[str, Any]) -> str:
    reason = next((f"{key}: {row[key]}" for key in ("refused", "crashed", "skipped") if key in row), None)
    return f"{row['model']:<45} " + (
        reason or f"{row['blocks']} blocks, {row['boundaries']} boundaries, {row['seconds']} s"
    )


def _summary(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{len(rows)} models, torch {torch.__version__}")
    for heading in ("exact", "exact, 4 blocks or more", "refused", "crashed", "skipped"):
        table.add_column(heading, justify="right")
    exact = [row for row in rows if "seconds" in row]
    counts = [len(exact), sum(row["blocks"] >= 4 for row in exact)]
    counts += [sum(key in row for row in rows) for key in ("refused", "crashed", "skipped")]
    table.add_row(*map(str, counts))
    return table


if __name__ == "__main__":
    main()
