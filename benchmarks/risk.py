"""Thresholds with a guarantee, thresholds per exit, and the shift monitor, on a real CIFAR-10 backbone.

    python benchmarks/risk.py --data DIR --weights cifar10_resnet56.safetensors --out results/risk

DIR holds ``cifar10_train.npz`` and ``cifar10_test.npz`` (``images`` N×32×32×3 uint8, ``labels``). Three linear exits at 25, 50
and 75% of a frozen ResNet-56's MACs are trained for a few epochs; outputs on the test images, as they are and as JPEG of
quality 75, are kept in the output folder and used again. Everything after that is splits of these outputs:

1. thresholds calibrated on 2,000 images and measured on 2,000 others, over 200 random splits; a promise is about the
   distribution that splits are drawn from, so whether it was kept is told by all 5,000 images;
2. thresholds for budgets, chosen on 2,500 images and measured on the 2,500 others, over 20 random splits;
3. the monitor: calibrated on 2,500 images, fed with draws (with replacement) from the 2,500 others, 100 times each;
4. milliseconds: the compiled engine at a τ calibrated on 2,000 images against the equally compiled backbone, on images that
   neither trained nor calibrated anything.

``--parts`` runs some of these alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from risk_budgets import budget_table, budgets
from risk_milliseconds import milliseconds, time_table
from risk_monitor import monitor
from risk_outputs import outputs_of
from risk_promises import promise_table, promises
from tables import write

from exitkit.common.console import make_console

PARTS = ["promises", "budgets", "monitor", "milliseconds"]


def main() -> None:
    args = _arguments()
    console = make_console()
    clean, jpeg, training = outputs_of(args)
    parts: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "promises": (lambda: promises(clean, training), lambda rows: promise_table(rows, clean, args.depth)),
        "budgets": (lambda: budgets(clean), budget_table),
        "monitor": (lambda: monitor(clean, jpeg), lambda found: found),
        "milliseconds": (lambda: milliseconds(clean, training, args), time_table),
    }
    results: dict[str, Any] = {}
    for part in args.parts:
        measure, shown = parts[part]
        results[part] = measure()
        console.print(shown(results[part]))
    accuracy = {"clean": clean.accuracy().tolist(), "jpeg": jpeg.accuracy().tolist()}
    name = "results.json" if args.parts == PARTS else f"results-{'-'.join(args.parts)}.json"
    write(args.out / name, args, costs=clean.costs.tolist(), accuracy=accuracy, **results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of the backbone")
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--exits", type=Path, help="exits trained before, such as those of benchmarks/front.py")
    parser.add_argument("--images", type=int, default=6_000, help="training images")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path("results/risk"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
