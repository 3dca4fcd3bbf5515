"""How heavy a report is, and how fast it opens: methods × samples of made-up outputs, in headless Chromium.

python benchmarks/report.py --methods 10 --samples 10000
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

from exitkit import ExitOutputs
from exitkit.common.console import make_console
from exitkit.report import write_report, write_samples


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        outputs = {f"method-{n}": made_up(args.samples, args.exits, args.classes, n) for n in range(args.methods)}
        for name, one in outputs.items():
            one.save(Path(folder) / f"outputs-{name}.safetensors")
        images = [(torch.rand(3, 224, 224),)] * args.samples
        write_samples(folder, images, outputs)
        started = time.perf_counter()
        page = write_report([folder])
        written = time.perf_counter() - started
        opened, moved = open_in_browser(page)
        make_console().print(
            f"{args.methods} methods × {args.samples:,} samples × {args.exits} exits × {args.classes} classes: "
            f"{page.stat().st_size / 2**20:.2f} MiB, written in {written:.1f} s, opened in {opened:.2f} s, "
            f"one step of the slider {1e3 * moved:.1f} ms"
        )


def made_up(samples: int, exits: int, classes: int, seed: int) -> ExitOutputs:
    """Outputs whose later exits are surer and better."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    logits = torch.randn(samples, exits + 1, classes, generator=generator)
    logits[torch.arange(samples), :, labels] += torch.linspace(0.5, 4, exits + 1)
    return ExitOutputs(logits, labels, torch.arange(1, exits + 2).double(), float(exits + 1))


def open_in_browser(path: Path, steps: int = 50) -> tuple[float, float]:
    """Seconds until the page is loaded, drawn and its script has run, and for one step of the slider."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        started = time.perf_counter()
        page.goto(path.as_uri())
        page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        opened = time.perf_counter() - started
        milliseconds = page.evaluate(
            """(steps) => {
                const slider = document.getElementById("tau"), started = performance.now();
                for (let step = 0; step < steps; step++) {
                    slider.value = step;
                    slider.dispatchEvent(new Event("input", { bubbles: true }));
                    document.body.getBoundingClientRect();
                }
                return (performance.now() - started) / steps;
            }""",
            steps,
        )
        browser.close()
    return opened, milliseconds / 1e3


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("methods", 10), ("samples", 10_000), ("exits", 8), ("classes", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
