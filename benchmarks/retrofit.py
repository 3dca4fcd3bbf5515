"""What ``exitkit.retrofit`` finds by defaults alone, against configurations made by hand, on frozen models with real weights.

    python benchmarks/retrofit.py --data DIR [--tasks cifar10 imagenette sst2 agnews pneumonia] [--seeds 2]

DIR holds ``weights/``, ``imagenette/``, ``text/`` and ``medical/``; ``cifar10/cifar10_train.npz`` and ``cifar10_test.npz`` lie
in ``--out``. Each row is written as it comes, and a run that was killed goes on. By hand: the three configurations in
``retrofit_tasks.py``, trained on the same samples for as many epochs as retrofit's finishing has at most, calibrated on the
same samples with the same promise; the best of them is shown. *Untouched* samples were seen by nothing; *lost* is the share of
them that the backbone has right and the policy wrong, which the promise bounds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from retrofit_tasks import TASKS, Task, Way
from rich.table import Table
from tables import table

import exitkit
from exitkit.cli.bench import machine
from exitkit.common.console import make_console
from exitkit.common.files import replacing
from exitkit.retrofitting.candidates import is_light
from exitkit.retrofitting.finishing import EPOCHS
from exitkit.retrofitting.samples import held_out


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    console, rows = make_console(), []
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        task: Task | None = None
        for seed in range(args.seeds):
            path = args.out / f"{name}-{args.effort}-{seed}.json"
            if not path.exists():
                task = task or TASKS[name](args.data, args.out)
                _write(path, _row(name, task, seed, args))
            row = json.loads(path.read_text(encoding="utf-8"))
            for number in range(args.by_hand if seed == 0 else 0):
                path = args.out / f"{name}-{args.effort}-by-hand-{number}.json"
                if not path.exists():
                    task = task or TASKS[name](args.data, args.out)
                    _write(path, _by_hand(task.by_hand[number], task, seed, args))
                row["by_hand"].append(json.loads(path.read_text(encoding="utf-8")))
            rows.append(row)
            console.print(_table(rows))
    _write(args.out / "results.json", {"rows": rows, **machine()})


def _row(name: str, task: Task, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    options = {"mixed_precision": args.mixed_precision, "channels_last": args.channels_last}
    result = exitkit.retrofit(
        task.model,
        task.train,
        task.calibration,
        max_drop=task.max_drop,
        batch_size=args.batch_size,
        effort=args.effort,
        alternatives=task.alternatives,
        output_dir=args.out / f"{name}-{args.effort}-{seed}",
        seed=seed,
        **options,
    )
    result.save(args.out / f"{name}-{args.effort}-{seed}" / "result")
    row = {"task": name, "seed": seed, "max_drop": task.max_drop, "arguments": str(vars(args)), **machine()}
    return row | {
        "result": result.to_dict(),
        "untouched": _untouched(result.model, result.policy, task),
        "by_hand": [],
    }


def _untouched(model: exitkit.MultiExitModel | None, policy: Any, task: Task) -> dict[str, float] | None:
    if model is None:
        return None
    outputs = exitkit.collect(model, task.untouched)
    exits = torch.from_numpy(outputs.exits_at(policy))
    right = outputs.correct
    answered = right[torch.arange(len(right)), exits]
    return {
        "backbone": float(right[:, -1].double().mean()),
        "policy": float(answered.double().mean()),
        "lost": float((right[:, -1] & ~answered).double().mean()),
        "cost": float(outputs.costs[exits].mean()),
        "samples": len(outputs),
    }


def _by_hand(way: Way, task: Task, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    at, heads, method = way
    started = time.perf_counter()
    torch.manual_seed(seed)
    ee = exitkit.attach(task.model, at=at, head=heads, method=method, example_inputs=_example(task))
    split = held_out(task.train, None, seed)
    epochs = EPOCHS[args.effort]
    exitkit.Trainer(
        ee,
        epochs=epochs,
        patience=max(3, epochs // 3),
        seed=seed,
        cache=all(map(is_light, heads)),
        mixed_precision=args.mixed_precision,
        channels_last=args.channels_last,
        show_progress=False,
    ).fit(split.train, split.search)
    policy = exitkit.choose_threshold(exitkit.collect(ee, task.calibration), max_drop=task.max_drop)
    return {
        "at": at,
        "heads": heads,
        "method": method,
        "cost": policy.cost,
        "untouched": _untouched(ee, policy, task),
        "minutes": (time.perf_counter() - started) / 60,
    }


def _example(task: Task) -> Any:
    batch = next(iter(task.calibration))
    if isinstance(batch, dict):
        return {name: value[:2] for name, value in batch.items() if name != "labels"}
    return batch[0][:2]


def _table(rows: list[dict[str, Any]]) -> Table:
    headings = (
        "task",
        "seed",
        "verdict",
        "exits",
        "MACs saved",
        "time saved",
        "accuracy",
        "lost",
        "by hand",
        "search",
        "minutes",
    )
    note = (
        "accuracy: backbone to policy on untouched samples; lost: of them, against the promise; by hand: MACs saved by the "
        "best of three; search: epochs of the backbone's forward"
    )
    return table(headings, [_cells(row) for row in rows], "exitkit.retrofit by defaults", note)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    result, untouched = row["result"], row["untouched"]
    chosen = [one for one in result["candidates"] if one["dropped"] is None]
    times, policy = result["times"], result["policy"]
    saved = 0.0 if policy is None else 1 - policy["guarantee"]["cost"]
    faster = 0.0 if times["exits"] is None else 1 - times["exits"] / times["backbone"]
    hand = max((1 - one["cost"] for one in row["by_hand"]), default=None)
    return (
        row["task"],
        str(row["seed"]),
        result["verdict"],
        ", ".join(f"{one['head']} after {one['boundary']}" for one in chosen),
        f"{saved:.1%}",
        f"{faster:.1%}",
        "-" if untouched is None else f"{untouched['backbone']:.2%} to {untouched['policy']:.2%}",
        "-" if untouched is None else f"{untouched['lost']:.2%} of {row['max_drop']:.0%}",
        "-" if hand is None else f"{hand:.1%}",
        f"{result['epochs']:.1f}",
        f"{result['minutes']:.0f}",
    )


def _write(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--by-hand", type=int, default=3, help="so many of the three configurations, by the first seed"
    )
    parser.add_argument("--effort", choices=EPOCHS, default="standard")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results/retrofit"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
