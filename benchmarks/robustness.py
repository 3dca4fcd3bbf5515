"""How much damage exitkit survives: files, saves that race, calls from many threads, and promises; a table of figures.

    python benchmarks/robustness.py --rounds 3

Every row says what was tried how often, how often it ended as it should (the right result, or one clear error), and how often
it did not. The files are those of ``tests/test_fuzz.py``, damaged with other seeds.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exitkit
from exitkit import ExitkitError, choose_threshold
from exitkit.common.console import make_console
from tests.test_fuzz import KINDS, Kind, fault_of
from tests.test_hardening_guarantees import DELTA, MAX_DROP, drawn, true_risk
from tests.toy import TinyNet, images, noisy


@dataclass(frozen=True)
class Row:
    """What was tried how often, how often it ended badly, and the first such end."""

    what: str
    tried: int
    lost: int
    first: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often every kind of file is damaged as the test does"
    )
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="kinds of files; by default all")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    table = Table(title=f"seed 0, {args.rounds} rounds")
    for heading in ("attack", "tried", "survived", "lost", "the first that was lost"):
        table.add_column(heading, justify="left" if heading in ("attack", "the first that was lost") else "right")
    files = (damaged(name, KINDS[name], args.rounds) for name in args.kinds)
    for row in (*files, *racing_savers(), threads(), copies()):
        table.add_row(row.what, f"{row.tried:,}", f"{row.tried - row.lost:,}", f"{row.lost:,}", row.first[:80])
    make_console().print(table)


def damaged(name: str, kind: Kind, rounds: int) -> Row:
    """A kind of file, damaged as often as the test does, ``rounds`` times."""
    tried, faults = 0, []
    chance = random.Random(f"robustness {name}")
    with tempfile.TemporaryDirectory() as folder:
        path = kind.make(Path(folder))
        sound, before = path.read_bytes(), kind.read(path)
        for change, count in kind.changes.items():
            for _ in range(count * rounds):
                content = change(sound, chance)
                path.write_bytes(content)
                tried += 1
                if content != sound and (fault := fault_of(kind, path, before)) is not None:
                    faults.append(f"{change.__name__}: {fault}")
    return Row(name, tried, len(faults), next(iter(faults), ""))


def racing_savers(savers: int = 3, saves: int = 20) -> Iterator[Row]:
    """Threads that save into one folder, and one that reads all the while."""
    torch.manual_seed(0)
    net = TinyNet().eval()
    models = [noisy(exitkit.attach(net, images(), every=2, method="sdn")) for _ in range(savers)]
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        models[0].save_pretrained(folder)

        def save(model: exitkit.MultiExitModel) -> None:
            for _ in range(saves):
                try:
                    model.save_pretrained(folder)
                except Exception as error:
                    failed.append(f"{type(error).__name__}: {error}")

        threads_ = [threading.Thread(target=save, args=(model,)) for model in models]
        for one in threads_:
            one.start()
        read, unread = 0, []
        while any(one.is_alive() for one in threads_):
            read += 1
            try:
                exitkit.MultiExitModel.from_pretrained(TinyNet().eval(), folder, images())
            except ExitkitError as error:
                if "another backbone" not in str(error):
                    unread.append(str(error))
            except Exception as error:
                unread.append(f"{type(error).__name__}: {error}")
        exitkit.MultiExitModel.from_pretrained(net, folder, images())
    yield Row(f"saves of {savers} savers into one folder", savers * saves, len(failed), next(iter(failed), ""))
    yield Row("reads meanwhile", read, len(unread), next(iter(unread), ""))


def threads(count: int = 8, calls: int = 200) -> Row:
    """Calls of one engine from many threads, against the answers one by one."""
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), every=2, method="sdn"))
    engine = exitkit.compile(ee, 0.5)
    batches = [images(1 + number % 9) for number in range(calls)]
    expected = [engine(batch) for batch in batches]
    wrong: list[str] = []

    def call() -> None:
        for batch, answer in zip(batches, expected, strict=True):
            got = engine(batch)
            if not all(torch.equal(one, other) for one, other in zip(got, answer, strict=True)):
                wrong.append("another answer")

    running = [threading.Thread(target=call) for _ in range(count)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    return Row(f"engine calls from {count} threads", count * calls, len(wrong), next(iter(wrong), ""))


def copies(draws: int = 200) -> Row:
    """Calibration splits of 300 samples ten times over: more broken promises than 5% (and three standard errors)."""
    broken = 0
    for seed in range(draws):
        outputs = drawn(300, seed)
        policy = choose_threshold(outputs[torch.arange(300).repeat(10)], MAX_DROP, 1 - DELTA)
        broken += true_risk(policy.thresholds[0]) > MAX_DROP
    allowed = draws * DELTA + 3 * np.sqrt(draws * DELTA * (1 - DELTA))
    return Row(f"calibration draws with copies ({broken} broken)", draws, max(0, broken - int(allowed)))


if __name__ == "__main__":
    main()
