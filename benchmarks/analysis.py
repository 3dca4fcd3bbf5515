"""What training regimes do to a multi-exit model (Kubaty et al., section 3): five measurements, with controls, on CIFAR-10.

    python benchmarks/analysis.py resnet20 --data DIR
    python benchmarks/analysis.py vit --data DIR
    python benchmarks/analysis.py cost

DIR holds ``cifar10_train.npz``. Every backbone starts from random weights. For each seed: the backbone alone, then from it
``disjoint`` and ``mixed``, and ``joint`` from the same random weights with as many epochs in all. Two seeds of one regime are
the control for what a barrier means. Models and measurements lie in ``--out``, and what is there is not made again.

The findings of the paper are then compared, each as yes or no with its numbers, mean ± standard deviation over seeds.
``cost`` measures time and memory against exits, parameters and samples; it needs no data.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10 import Augmented, load
from safetensors.torch import load_file, save_file
from tables import cell, table, write
from torch import Tensor
from training import resident

import exitkit
from exitkit import analysis
from exitkit.analysis.measurement import Measurement
from exitkit.analysis.overview import Overview
from exitkit.common.console import make_console
from exitkit.common.files import replacing
from exitkit.models import cifar_resnet
from exitkit.reproduction.backbones import resnet20, vit_small_cifar
from exitkit.training import Phase

REGIMES = ("disjoint", "mixed", "joint")
BACKBONES = {"resnet20": (resnet20, "2L-64"), "vit": (vit_small_cifar, "1L")}
SCALE = 0.25
"""The noise at which mutual information is compared: far from saturation, far from 0."""
MEASURED = ("dominance", "rank", "information", "connectivity", "plane", "landscape")
Data = list[tuple[Tensor, Tensor]]


def main() -> None:
    args = _arguments()
    if args.backbone == "cost":
        _cost(args)
        return
    train = load(args.data / "cifar10_train.npz", args.images)
    models: dict[tuple[str, int], exitkit.MultiExitModel] = {}
    for seed in range(args.seeds):
        for regime in ("backbone", *REGIMES):
            models[regime, seed] = _trained(args, regime, seed, train)
    data = list(zip(*(part[: args.samples].split(250) for part in train), strict=True))
    found = {seed: _measured(args, models, seed, data) for seed in range(args.seeds)}
    between = _between(args, models, data)
    for seed, rows in found.items():
        Overview(rows).write(args.out / args.backbone / f"seed{seed}")
    findings = _findings(found, between)
    console = make_console()
    console.print(
        table(
            ("finding", "reproduced", "numbers"),
            findings,
            f"CIFAR-10, {args.backbone}: the paper's findings",
            f"{args.images:,} images, {args.pretraining} + {args.epochs} epochs, {args.seeds} seeds, {args.samples:,} samples",
        )
    )
    write(args.out / f"{args.backbone}.json", args, findings=findings)


def _attached(args: argparse.Namespace, seed: int) -> exitkit.MultiExitModel:
    torch.manual_seed(seed)
    make, head = BACKBONES[args.backbone]
    return exitkit.attach(make(), torch.zeros(2, 3, 32, 32), every=1, method="sdn", head=head)


def _trained(args: argparse.Namespace, regime: str, seed: int, train: tuple[Tensor, Tensor]) -> exitkit.MultiExitModel:
    """A model of a regime: read where it is there, otherwise trained and written."""
    ee = _attached(args, seed)
    path = args.out / args.backbone / f"{regime}-{seed}.safetensors"
    if path.exists():
        ee.load_state_dict(load_file(path))
        return ee.eval()
    last = len(ee.classifiers)
    options: dict[str, Any] = {"regime": regime, "epochs": args.epochs, "seed": seed, "lr": args.lr}
    if regime == "backbone":
        options |= {"regime": [Phase((last,), tuple(range(last + 1)))], "epochs": args.pretraining}
    elif regime == "joint":
        options["epochs"] += args.pretraining
    else:
        ee.load_state_dict(load_file(args.out / args.backbone / f"backbone-{seed}.safetensors"))
    if regime in ("mixed", "joint"):
        options |= {"analyse": "gradient_dominance", "analyse_every": max(1, options["epochs"] // 10)}
    folder = args.out / args.backbone / f"run-{regime}-{seed}"
    exitkit.Trainer(ee, output_dir=folder, show_progress=True, channels_last=True, **options).fit(Augmented(*train))
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in ee.state_dict().items()}, temporary)
    return ee.eval()


def _kept(path: Path, kind: type[Measurement], measure: Callable[[], Measurement]) -> Any:
    """A measurement, read where it is there."""
    if path.exists():
        return kind.load(path)
    started = time.perf_counter()
    found = measure()
    print(f"{path.stem}: {time.perf_counter() - started:.0f} s", flush=True)
    found.save(path)
    return found


def _measured(
    args: argparse.Namespace, models: dict[tuple[str, int], exitkit.MultiExitModel], seed: int, data: Data
) -> dict[str, dict[str, Any]]:
    """By measurement and regime; the backbone alone is that of disjoint."""
    rows: dict[str, dict[str, Any]] = {"dominance": {}, "rank": {}, "information": {}, "landscape": {}}
    for regime in REGIMES:
        ee = models[regime, seed]
        calls: dict[str, tuple[type[Measurement], Callable[[], Measurement]]] = {
            "dominance": (analysis.GradientDominance, lambda ee=ee: analysis.gradient_dominance(ee, data)),  # type: ignore[misc]
            "rank": (analysis.Rank, lambda ee=ee: analysis.numerical_rank(ee, data)),  # type: ignore[misc]
            "information": (analysis.Information, lambda ee=ee: analysis.mutual_information(ee, data)),  # type: ignore[misc]
            "landscape": (
                analysis.Landscape,
                lambda ee=ee: analysis.landscape(ee, data[: args.landscape_batches], points=args.points),  # type: ignore[misc]
            ),
        }
        for name, (kind, call) in calls.items():
            path = args.out / args.backbone / f"{name}-{regime}-{seed}.safetensors"
            rows[name][regime] = _kept(path, kind, call)
    return rows


def _between(
    args: argparse.Namespace, models: dict[tuple[str, int], exitkit.MultiExitModel], data: Data
) -> dict[str, list[analysis.Connectivity]]:
    """Paths between regimes of one seed, and between two seeds of one regime."""
    pairs = [((a, seed), (b, seed)) for seed in range(args.seeds) for a, b in (REGIMES[:2], REGIMES[::2], REGIMES[1:])]
    pairs += [((regime, 0), (regime, seed)) for regime in REGIMES for seed in range(1, args.seeds)]
    found: dict[str, list[analysis.Connectivity]] = {}
    for first, second in pairs:
        name = f"{first[0]} to {second[0]}"
        path = args.out / args.backbone / f"path-{first[0]}-{first[1]}-{second[0]}-{second[1]}.safetensors"
        call = lambda one=models[first], other=models[second]: analysis.connectivity(one, other, data)  # noqa: E731
        found.setdefault(name, []).append(_kept(path, analysis.Connectivity, call))
    path = args.out / args.backbone / "plane.safetensors"
    one, two, three = (models[regime, 0] for regime in REGIMES)
    few = data[: args.landscape_batches]
    _kept(path, analysis.Plane, lambda: analysis.plane(one, two, three, few)).plot(path.with_suffix(".png"))
    return found


def _findings(
    found: dict[int, dict[str, dict[str, Any]]], between: dict[str, list[analysis.Connectivity]]
) -> list[tuple[str, str, str]]:
    return [*_of_dominance(found), *_of_basins(between), *_of_features(found), _of_landscapes(found)]


def _verdict(name: str, holds: Sequence[bool], numbers: str) -> tuple[str, str, str]:
    """Yes or no where all seeds agree."""
    agreed = "yes" if all(holds) else "no" if not any(holds) else f"in {sum(holds)} of {len(holds)} seeds"
    return name, agreed, numbers


def _of_dominance(found: dict[int, dict[str, dict[str, Any]]]) -> list[tuple[str, str, str]]:
    rows = []
    for regime, wanted in (("mixed", "the deepest exit dominates most"), ("joint", "a middle exit dominates most")):
        measured = [rows["dominance"][regime] for rows in found.values()]
        for what, curves in (
            ("", [one.dominance for one in measured]),
            (", as a share of the ceiling", [one.dominance / one.ceiling for one in measured]),
        ):
            first = [int(curve.argmax()) for curve in curves]
            last = len(curves[0]) - 1
            holds = [at == last if regime == "mixed" else 0 < at < last for at in first]
            values = " ".join(cell(list(column), 2) for column in zip(*curves, strict=True))
            rows.append(_verdict(f"{regime}: {wanted}{what}", holds, f"exit {first}: {values}"))
    return rows


def _of_basins(between: dict[str, list[analysis.Connectivity]]) -> list[tuple[str, str, str]]:
    barriers = {name: [one.objective_barrier for one in paths] for name, paths in between.items()}
    controls = [b for name, those in barriers.items() if name.split()[0] == name.split()[2] for b in those]
    said = {name: cell(those, 2) for name, those in barriers.items()}
    if not controls:
        return [("basins", "not known", f"barriers {said}; without a second seed there is no control")]
    half = min(controls) / 2
    return [
        _verdict(
            "disjoint and mixed in one basin: a barrier under half of any two seeds'",
            [one < half for one in barriers["disjoint to mixed"]],
            f"{said['disjoint to mixed']} against {cell(controls, 2)} between seeds",
        ),
        _verdict(
            "joint in another: a barrier to disjoint of at least half of any two seeds'",
            [one >= half for one in barriers["disjoint to joint"]],
            f"{said['disjoint to joint']} against {cell(controls, 2)} between seeds; {said}",
        ),
        _of_heights(between["disjoint to mixed"]),
    ]


def _of_heights(paths: Sequence[analysis.Connectivity]) -> tuple[str, str, str]:
    first, last = ([float(path.objective[at]) for path in paths] for at in (0, -1))
    holds = [other < one for one, other in zip(first, last, strict=True)]
    return _verdict("mixed lies lower than disjoint", holds, f"objective {cell(last, 2)} against {cell(first, 2)}")


def _of_features(found: dict[int, dict[str, dict[str, Any]]]) -> list[tuple[str, str, str]]:
    ranks = {regime: [rows["rank"][regime].rank for rows in found.values()] for regime in REGIMES}
    falls = [float(np.corrcoef(np.arange(len(rank)), rank)[0, 1]) for rank in ranks["disjoint"]]
    rows = [
        _verdict("rank falls with depth in the plain backbone", [one < 0 for one in falls], f"r = {cell(falls, 2)}")
    ]
    for regime in ("mixed", "joint"):
        rises = [float((a / b).mean()) for a, b in zip(ranks[regime], ranks["disjoint"], strict=True)]
        rows.append(
            _verdict(f"{regime}: rank rises", [one > 1 for one in rises], f"{cell(rises, 2)} times the backbone's")
        )
        gains = []
        for measured in found.values():
            at = int(abs(measured["information"][regime].scale - SCALE).argmin())
            gains.append(
                measured["information"][regime].estimate[at] - measured["information"]["disjoint"].estimate[at]
            )
        third = max(1, len(gains[0]) // 3)
        early, late = (
            [float(part.mean()) for part in parts]
            for parts in zip(*((g[:third], g[-third:]) for g in gains), strict=True)
        )
        holds = [one > 0 > other for one, other in zip(early, late, strict=True)]
        rows.append(
            _verdict(
                f"{regime}: information higher early and lower late",
                holds,
                f"{cell(early, 2)} nats in the first third, {cell(late, 2)} in the last (c = {SCALE})",
            )
        )
    return rows


def _of_landscapes(found: dict[int, dict[str, dict[str, Any]]]) -> tuple[str, str, str]:
    def alike(measured: dict[str, dict[str, Any]], one: str, other: str) -> float:
        """The correlation of two surfaces, in logarithms."""
        surfaces = [np.log(np.minimum(measured["landscape"][name].objective, 1e3)).ravel() for name in (one, other)]
        return float(np.corrcoef(*surfaces)[0, 1])

    near, far = ([alike(m, "joint", other) for m in found.values()] for other in ("mixed", "disjoint"))
    holds = [one > other for one, other in zip(near, far, strict=True)]
    numbers = f"correlation with joint: mixed {cell(near, 2)}, disjoint {cell(far, 2)}"
    return _verdict("landscapes of joint and mixed alike, disjoint different", holds, numbers)


def _cost(args: argparse.Namespace) -> None:
    """CPU seconds and MiB of each measurement, one thing changed at a time."""
    settings = {
        f"ResNet-20, 8 exits, {args.samples:,} samples": (20, 1, args.samples),
        "2 exits": (20, 4, args.samples),
        f"{args.samples // 4:,} samples": (20, 1, args.samples // 4),
        "ResNet-56 (3 times the parameters)": (56, 3, args.samples),
    }
    rows, results = [], {}
    for name, setting in settings.items():
        cells = []
        for what in MEASURED:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, megabytes = pool.apply(_costs, (what, *setting, args.points))
            cells.append(f"{seconds:.0f} s, {megabytes:.0f} MiB")
            results[f"{name}: {what}"] = (seconds, megabytes)
            print(f"{name}: {what}: {cells[-1]}", flush=True)
        rows.append((name, *cells))
    caption = f"CPU seconds; plane and landscape have {args.points} × {args.points} points"
    make_console().print(table(("", *MEASURED), rows, "What a measurement costs", caption))
    write(args.out / "cost.json", args, results=results)


def _costs(what: str, depth: int, every: int, samples: int, points: int) -> tuple[float, float]:
    """Of one measurement in a process of its own, beyond the models and the data."""
    ee, other, third = (_random(depth, every, seed) for seed in range(3))
    data = [(torch.randn(50, 3, 32, 32), torch.randint(10, (50,))) for _ in range(samples // 50)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before, started = resident("VmRSS"), time.process_time()
    if what == "connectivity":
        analysis.connectivity(ee, other, data, samples=samples)
    elif what == "plane":
        analysis.plane(ee, other, third, data, samples=samples, points=points)
    elif what == "dominance":
        analysis.gradient_dominance(ee, data, batches=len(data))
    elif what == "landscape":
        analysis.landscape(ee, data, samples=samples, points=points)
    elif what == "rank":
        analysis.numerical_rank(ee, data, samples=samples)
    else:
        analysis.mutual_information(ee, data, samples=samples)
    return time.process_time() - started, (resident("VmHWM") - before) / 1024


def _random(depth: int, every: int, seed: int) -> exitkit.MultiExitModel:
    torch.manual_seed(seed)
    return exitkit.attach(cifar_resnet(depth), torch.zeros(2, 3, 32, 32), every=every, method="sdn", head="2L-64")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=[*BACKBONES, "cost"])
    parser.add_argument("--data", type=Path, help="folder with cifar10_train.npz")
    parser.add_argument("--images", type=int, default=10_000, help="of training")
    parser.add_argument("--pretraining", type=int, default=20, help="epochs of the backbone alone")
    parser.add_argument("--epochs", type=int, default=20, help="of disjoint and mixed; joint has both")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=2_000, help="that are measured on")
    parser.add_argument("--points", type=int, default=21, help="of each axis of a landscape, and in cost of a plane")
    parser.add_argument("--landscape-batches", type=int, default=8, help="of 250 samples, for landscape and plane")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/analysis"))
    args = parser.parse_args()
    if args.backbone != "cost" and args.data is None:
        parser.error(f"{args.backbone} needs --data")
    return args


if __name__ == "__main__":
    main()
