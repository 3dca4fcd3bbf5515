"""Exits in a pretrained MiniLM-L6: methods, training regimes, and the front of its own first layers.

    python benchmarks/text.py sst2|agnews --data DIR [--seeds 3] [--texts 3000] [--epochs 8]

DIR holds ``weights/minilm_l6`` and ``text/``. For every seed the pretrained network is fine-tuned on the training texts; exits
stand after each layer but the last. Accuracy by share of the network's MACs, on the part dev (SST-2) or test (AG News):

* methods on the frozen network, with the same heads, which learn from cached features; ``ztw`` also taken apart;
* regimes (Kubaty et al.), method sdn: ``disjoint`` is the frozen row; ``mixed`` trains everything for as many passes as the
  fine-tuning had, from the fine-tuned weights; ``joint`` spends the passes of both on everything, from the pretrained ones;
* the first n layers of the pretrained network, fine-tuned alone: what exits have to beat.

Every number is kept in ``--out`` as it comes, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from retrofit_tasks import fine_tune, minilm, read_texts, trained
from tables import BUDGETS, at, cell, table, write
from torch import Tensor, nn
from torch.utils.data import DataLoader

import exitkit
from exitkit.common.console import make_console
from exitkit.evaluation import ExitOutputs

METHODS = {
    "ztw": exitkit.ZTW(),
    "ztw without links": exitkit.ZTW(cascade=False),
    "ztw without ensemble": exitkit.ZTW(ensemble="none"),
    "sdn": exitkit.SDN(),
    "gpf": exitkit.GPF(),
}
"""``pbee`` reads the exits of ``sdn``."""
REGIMES = ("mixed", "joint")
LAYERS, PASSES, BATCH = 6, 2, 32
TASKS = {"sst2": (2, "dev", 32), "agnews": (4, "test", 48)}
"""Classes, the part that is measured on, and tokens."""
Texts = list[tuple[str, int]]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    path = args.out / f"{args.task}.json"
    found: dict[str, Any] = json.loads(path.read_text())["found"] if path.exists() else {}
    part = TASKS[args.task][1]
    train = read_texts(args.data / "text" / f"{args.task}_train.tsv")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: args.texts]
    texts = (
        [train[row] for row in order.tolist()],
        read_texts(args.data / "text" / f"{args.task}_{part}.tsv")[: args.tested],
    )
    for seed in range(args.seeds):
        for name, measure in _rows(args, seed, texts).items():
            if f"{name}/{seed}" not in found:
                found[f"{name}/{seed}"] = measure()
                make_console().print(f"{name}/{seed}: {_numbers(found[f'{name}/{seed}'])}", soft_wrap=True)
                write(path, args, found=found)
    make_console().print(_table(found, args))


def _rows(args: argparse.Namespace, seed: int, texts: tuple[Texts, Texts]) -> dict[str, Callable[[], dict[str, Any]]]:
    rows: dict[str, Callable[[], dict[str, Any]]] = {}
    for method in (*METHODS, "pbee"):
        rows[method] = lambda method=method: _frozen(args, seed, method, texts)  # type: ignore[misc]
    for regime in REGIMES:
        rows[regime] = lambda regime=regime: _trained(args, seed, regime, texts)  # type: ignore[misc]
    for layers in range(1, LAYERS):
        rows[f"first {layers}"] = lambda layers=layers: _first(args, seed, layers, texts)  # type: ignore[misc]
    return rows


def _frozen(args: argparse.Namespace, seed: int, method: str, texts: tuple[Texts, Texts]) -> dict[str, Any]:
    ee = _attached(args, seed, _fine_tuned(args, seed, LAYERS, texts[0]), METHODS.get(method, exitkit.SDN()))
    trainer = exitkit.Trainer(ee, epochs=args.epochs, seed=seed, cache=True, show_progress=False)
    trainer.fit(_loader(args, texts[0], shuffle=True))
    if method == "pbee":
        ee.method = exitkit.PBEE()
    return _kept(exitkit.collect(ee, _loader(args, texts[1])))


def _trained(args: argparse.Namespace, seed: int, regime: str, texts: tuple[Texts, Texts]) -> dict[str, Any]:
    mixed = regime == "mixed"
    backbone = _fine_tuned(args, seed, LAYERS, texts[0]) if mixed else _pretrained(args, seed)
    ee = _attached(args, seed, backbone, exitkit.SDN())
    trainer = exitkit.Trainer(
        ee, "mixed", epochs=PASSES if mixed else 2 * PASSES, lr=1e-3, backbone_lr=5e-5, optimizer=torch.optim.AdamW,
        weight_decay=0.01, seed=seed, show_progress=False,
    )  # fmt: skip
    trainer.fit(_loader(args, texts[0], shuffle=True))
    return _kept(exitkit.collect(ee, _loader(args, texts[1])))


def _first(args: argparse.Namespace, seed: int, layers: int, texts: tuple[Texts, Texts]) -> dict[str, Any]:
    """The first layers alone; their cost as a share of all six, counted by the exits of the whole."""
    model: Any = _fine_tuned(args, seed, layers, texts[0])
    right = 0
    with torch.inference_mode():
        for batch in _loader(args, texts[1]):
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(1) == labels).sum())
    whole = exitkit.attach(_pretrained(args, seed), _example(args), every=1, method="sdn", head="tail")
    share = [one.macs_fraction for one in whole.exits][layers - 1]
    return {"accuracy": [100 * right / len(texts[1])], "costs": [share]}


def _kept(outputs: ExitOutputs) -> dict[str, Any]:
    return {
        "accuracy": (100 * outputs.accuracy()).tolist(),
        "costs": outputs.costs.tolist(),
        "budgets": [at(outputs, budget) for budget in BUDGETS],
    }


def _attached(args: argparse.Namespace, seed: int, backbone: nn.Module, method: Any) -> exitkit.MultiExitModel:
    torch.manual_seed(seed)
    return exitkit.attach(backbone, _example(args), every=1, method=method, head=args.head)


def _pretrained(args: argparse.Namespace, seed: int, layers: int = LAYERS) -> nn.Module:
    return minilm(args.data / "weights" / "minilm_l6", TASKS[args.task][0], layers, seed)


def _fine_tuned(args: argparse.Namespace, seed: int, layers: int, texts: Texts) -> nn.Module:
    """Fine-tuned once, then read."""
    model = _pretrained(args, seed, layers)
    path = args.out / f"{args.task}-{layers}-layers-{seed}.safetensors"
    trained(model, _loader(args, texts, shuffle=True), path, partial(fine_tune, seed=seed))
    return model


def _loader(args: argparse.Namespace, texts: Texts, shuffle: bool = False) -> DataLoader[Any]:
    from transformers import AutoTokenizer

    tokenizer, length = AutoTokenizer.from_pretrained(args.data / "weights" / "minilm_l6"), TASKS[args.task][2]

    def collate(rows: Texts) -> dict[str, Tensor]:
        given, labels = zip(*rows, strict=True)
        made = tokenizer(list(given), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {key: made[key] for key in ("input_ids", "attention_mask")} | {"labels": torch.tensor(labels)}

    return DataLoader(texts, BATCH, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]


def _example(args: argparse.Namespace) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = next(iter(_loader(args, [("one text", 0), ("another", 0)])))
    return {key: value for key, value in batch.items() if key != "labels"}


def _numbers(row: dict[str, Any]) -> str:
    return " ".join(f"{value:.1f}" for value in row["accuracy"])


def _table(found: dict[str, Any], args: argparse.Namespace) -> Any:
    rows = []
    for name in dict.fromkeys(key.partition("/")[0] for key in found):
        runs = [found[f"{name}/{seed}"] for seed in range(args.seeds) if f"{name}/{seed}" in found]
        last = cell([run["accuracy"][-1] for run in runs])
        if name.startswith("first"):
            rows.append(
                (f"{name} of {LAYERS} layers, {runs[0]['costs'][0]:.0%} of the MACs", *("" for _ in BUDGETS), last)
            )
        else:
            rows.append((name, *(cell([run["budgets"][b] for run in runs]) for b in range(len(BUDGETS))), last))
    return table(
        ("", *(f"{budget:.0%}" for budget in BUDGETS), "no sample leaves"),
        rows,
        f"{args.task}, MiniLM-L6, {LAYERS - 1} exits ({args.head}): accuracy (%) by share of its MACs",
        f"{args.texts:,} texts, {PASSES} passes of fine-tuning, {args.epochs} of the exits, {args.seeds} seeds",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True, help="folder with weights/minilm_l6 and text/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=3_000, help="of training")
    parser.add_argument("--tested", type=int, default=2_000, help="at most")
    parser.add_argument("--epochs", type=int, default=8, help="of the exits on the frozen network")
    parser.add_argument("--head", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/text"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
