"""Train two networks on handwritten digits: on device jax eagerly and compiled, and on torch's CPU for comparison.

The training step is ordinary PyTorch. `torchax.compile(train_step)` turns all of it (forward, backward and the optimizer)
into one XLA program. Prints held-out accuracy, loss curves and milliseconds per step; writes a plot.

    python examples/train_digits.py [--epochs 15] [--out out]

The data is scikit-learn's `load_digits`, 1797 images of 8x8 pixels, which ship inside the package.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits

matplotlib.use("agg")
import matplotlib.pyplot as plt

BATCH = 64
GOAL = 0.95
MODES = {"jax, compiled": ("jax", True), "jax, eager": ("jax", False), "torch CPU": ("cpu", False)}

Batch = tuple[torch.Tensor, torch.Tensor]


class MyModel(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8 * 8, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 8 * 8)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class ConvNet(nn.Module):
    """Two convolutions with batch normalization, and dropout before each linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Dropout(0.25), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Dropout(0.25), nn.Linear(64, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@dataclasses.dataclass
class Run:
    """What one training run gave."""

    losses: list[float]  # mean of each epoch
    accuracy: float
    milliseconds: float  # per step, median over the epochs after the first
    first: float  # seconds until the first step's loss was there


def load(seed: int) -> tuple[Batch, Batch]:
    """Images as float32 (n, 1, 8, 8) in 0..1 and labels (n,): a training set and 20 % held out."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digits, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, held = order[360:], order[:360]
    return (images[train], labels[train]), (images[held], labels[held])


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    if isinstance(model, ConvNet):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def train(
    model: nn.Module, data: Batch, held: Batch, device: str, compiled: bool, epochs: int, seed: int, advance: Callable
) -> Run:
    """Train a copy of `model` on `device`; the batches are the same for every device."""
    model = copy.deepcopy(model).to(device)
    optimizer = make_optimizer(model)

    def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    step = torchax.compile(train_step) if compiled else train_step
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    images, labels = data
    losses, times = [], []
    start, first = time.perf_counter(), 0.0
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=shuffle)[: len(labels) // BATCH * BATCH].view(-1, BATCH)
        batches = [(images[rows].to(device), labels[rows].to(device)) for rows in order]
        begin = time.perf_counter()
        got = []
        for x, y in batches:
            got.append(step(x, y).detach())
            if not first:
                got[0].item()
                first = time.perf_counter() - start
        total = sum(loss.item() for loss in got)  # waits for the device
        times.append((time.perf_counter() - begin) / len(batches) * 1e3)
        losses.append(total / len(batches))
        advance()
    model.eval()
    with torch.no_grad():
        right = (model(held[0].to(device)).argmax(1) == held[1].to(device)).float().mean().item()
    return Run(losses, right, statistics.median(times[1:] or times), first)


def sparkline(values: list[float]) -> str:
    """The values on a logarithmic scale, one character each, at most 15 of them."""
    every = -(-len(values) // 15)
    heights = [math.log(v) for v in values[::every]]
    low, high = min(heights), max(heights)
    return "".join("▁▂▃▄▅▆▇█"[round((h - low) / ((high - low) or 1) * 7)] for h in heights)


def plot(runs: dict[str, dict[str, Run]], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(1, len(runs) + 1, figsize=(5 * (len(runs) + 1), 4), layout="constrained")
    styles = {"jax, compiled": "-", "jax, eager": "--", "torch CPU": ":"}
    for ax, (name, by_mode) in zip(axes, runs.items(), strict=False):
        for mode, run in by_mode.items():
            ax.plot(
                range(1, len(run.losses) + 1), run.losses, styles[mode], label=f"{mode}: {run.accuracy:.1%} held out"
            )
        ax.set(title=name, xlabel="epoch", ylabel="training loss", yscale="log")
        ax.grid(alpha=0.3)
        ax.legend()
    bars = axes[-1]
    width = 0.8 / len(MODES)
    for i, mode in enumerate(MODES):
        places = [k + (i - 1) * width for k in range(len(runs))]
        drawn = bars.bar(places, [by_mode[mode].milliseconds for by_mode in runs.values()], width, label=mode)
        bars.bar_label(drawn, fmt="%.2f", fontsize=8)
    bars.set(title="one training step", ylabel="milliseconds", yscale="log", xticks=range(len(runs)))
    bars.set_xticklabels(list(runs))
    bars.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train two networks on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder of the plot")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")

    console = Console()
    train_set, held = load(options.seed)
    console.print(
        f"{len(train_set[1])} images to train on, {len(held[1])} held out; steps of {BATCH}; "
        f"torch {torch.__version__}, torchax {torchax.__version__}"
    )
    torch.manual_seed(options.seed)
    models = {"MyModel": MyModel(), "ConvNet": ConvNet()}
    runs: dict[str, dict[str, Run]] = {}
    columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name, model in models.items():
            runs[name] = {}
            for mode, (device, compiled) in MODES.items():
                task = progress.add_task(f"{name}, {mode}", total=options.epochs)
                runs[name][mode] = train(
                    model,
                    train_set,
                    held,
                    device,
                    compiled,
                    options.epochs,
                    options.seed,
                    advance=lambda task=task: progress.advance(task),
                )

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for heading in ("model", "run", "held out", "loss", "curve", "ms/step", "1st step"):
        table.add_column(
            heading, no_wrap=True, justify="right" if "step" in heading or heading == "held out" else "left"
        )
    for name, by_mode in runs.items():
        for mode, run in by_mode.items():
            table.add_row(
                name,
                mode,
                f"{run.accuracy:.1%}",
                f"{run.losses[-1]:.3f}",
                sparkline(run.losses),
                f"{run.milliseconds:.2f}",
                f"{run.first:.1f} s",
            )
        table.add_section()
    console.print(table)
    path = options.out / "train_digits.png"
    plot(runs, path)
    console.print(f"curves: {path}")
    low = [
        f"{name}, {mode}: {run.accuracy:.1%}"
        for name, by_mode in runs.items()
        for mode, run in by_mode.items()
        if run.accuracy <= GOAL
    ]
    if low:
        console.print(f"held-out accuracy is not over {GOAL:.0%}: " + "; ".join(low), style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
