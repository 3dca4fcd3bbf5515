"""Transfer learning with exits: an ImageNet network learns the four classes of OCT2017, and to stop early.

    python examples/oct2017.py --data OCT2017 --model torchvision:resnet50
    python examples/oct2017.py --data pneumoniamnist.npz --model timm:mobilenetv2_100 --quick

It needs the library of its model: pip install 'exitkit[torchvision]' or 'exitkit[timm]'.

Zero Time Waste (Wołczyk et al. 2021) is also tried on an ImageNet ResNet-50 that learns OCT2017 (Kermany et al. 2018), retina
scans in the folders ``CNV``, ``DME``, ``DRUSEN`` and ``NORMAL`` of ``train/`` and ``test/``. Any other image folder, or an
``.npz`` with MedMNIST's arrays, will do. ``attach(num_classes=)`` gives the network a fresh last layer; that layer and the
exits are all that learns.

PneumoniaMNIST (chest X-rays of two classes), MobileNetV2 with ImageNet weights, ``--quick``, one run on a CPU: the network
with its new layer has 83% on 100 test images; with exits 81% at half of its MACs, 83% at three quarters. 200 images and one
epoch are for trying the program; the exits are not trained out. It takes 48 s of CPU time on one core.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

import exitkit
from exitkit.cli.data.loading import load_data
from exitkit.cli.sources import load_model


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    backbone = load_model(args.model, None if args.weights == "random" else args.weights)
    split = load_data(args.data, backbone)
    train, test = split.loaders(args.batch_size, args.images, args.seed)
    if args.test_images is not None:
        test = first(test, args.test_images)
    classes = split.classes if args.classes is None else args.classes
    if classes is None:
        raise exitkit.ExitkitError("--classes is missing, and nothing in these data tells their number")

    ee = exitkit.attach(backbone, every=args.every, method=args.method, head=args.head, num_classes=classes)
    print(
        f"{classes} classes, {len(ee.boundaries)} exits, heads add {ee.exits[-1].macs_fraction - 1:.1%} of the network"
    )
    exitkit.Trainer(ee, regime="disjoint", epochs=args.epochs, lr=args.lr, seed=args.seed).fit(train)
    outputs = exitkit.collect(ee, test)
    for place, accuracy in zip(ee.exits, outputs.accuracy(), strict=True):
        print(f"{place.name:<24}{place.macs_fraction:>7.1%} of the MACs{accuracy:>9.2%}")
    print(f"\n{len(outputs)} test images, method {args.method}:\n{outputs.curve().budget_table()}")
    if args.out:
        ee.save_pretrained(args.out, outputs=outputs)
        print(f"Exits and last layer written to {args.out}/")
    print(f"{time.perf_counter() - started:.0f} s")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="image folder with train/ and test/, or an .npz of images")
    parser.add_argument(
        "--model", default="torchvision:resnet50", help="torchvision:NAME, timm:NAME or package:function"
    )
    parser.add_argument("--weights", default="pretrained", help="'pretrained', a state-dict file, or 'random'")
    parser.add_argument("--classes", type=int, help="by default as many as the training labels have")
    parser.add_argument("--method", default="ztw")
    parser.add_argument("--every", type=int, default=4, help="an exit after every n-th block")
    parser.add_argument("--head", default="conv", help="the paper has convolutions; 'auto' costs less")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, help="train on so many images only")
    parser.add_argument("--test-images", type=int, help="test on so many images only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder to save the exits to")
    parser.add_argument(
        "--quick", action="store_true", help="200 training and 100 test images, 1 epoch, batches of 16"
    )
    args = parser.parse_args(arguments)
    if args.quick:
        args.images, args.test_images, args.epochs, args.batch_size = 200, 100, 1, 16
    return args


def first(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    """A loader of ``count`` of the samples, spread evenly, since folders are read class by class."""
    size = len(loader.dataset)  # type: ignore[arg-type]
    rows = torch.linspace(0, size - 1, min(count, size)).long().tolist()
    return DataLoader(Subset(loader.dataset, rows), loader.batch_size, collate_fn=loader.collate_fn)


if __name__ == "__main__":
    try:
        main()
    except exitkit.ExitkitError as error:
        raise SystemExit(f"oct2017: {error}") from None
