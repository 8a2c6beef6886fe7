"""What choosing the filters of a group gives: ``python -m benchmarks permutation [--seeds N]``.

Models trained on the embedded digits are pruned by magnitude, every layer alike, with groups of neighbours and with
permuted groups. Shown: the saliency kept, as a share of what the best unstructured mask of as many weights keeps, and
the test accuracy right after pruning, batch norm measured again, nothing trained. Writes
benchmarks/results/permutation.md.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.config import load_config
from autoprune.evaluation.dense import dense_model
from autoprune.masks import Masks, apply_masks_
from autoprune.model.inventory import Inventory, take_inventory
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.patterns.base import Pattern
from autoprune.registry import Choice
from autoprune.repack import pack
from autoprune.report.console import Console
from autoprune.report.table import markdown_table
from autoprune.tasks import TASKS, Task
from autoprune.training.batch_norm import recalibrate_batch_norm_
from benchmarks.lib.command_line import add_seeds, command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance
from benchmarks.lib.pruning import magnitude_masks

ROOT = Path(__file__).parent.parent
SIZES = (4, 8, 16)
SPARSITIES = (0.5, 0.75, 0.9)
SHOWN = (8, 0.75)  # group size and sparsity of the table of layers


@dataclass(frozen=True)
class Cell:
    """One model, pattern and sparsity: shares kept, over all and by layer, accuracy, seconds to make the masks."""

    kept: float
    by_layer: dict[str, float]
    accuracy: float
    seconds: float


def main(argv: Sequence[str]) -> int:
    parser = command_line("permutation", __doc__)
    add_seeds(parser, 2)
    given = parser.parse_args(argv)
    seeds = given.seeds
    torch.set_num_threads(1)
    cells: dict[tuple[int, float, bool], list[Cell]] = {}
    dense: list[float] = []
    free: dict[float, list[float]] = {sparsity: [] for sparsity in SPARSITIES}
    for seed in range(seeds):
        config = load_config(ROOT / "configs" / "digits.toml", [f"seed={seed}", f"task.seed={seed}"])
        task = TASKS.create(config.task)
        model = dense_model(task, config.task, task.dense_training, seed, Console())
        inventory = take_inventory(model, task.example_inputs(1))
        dense.append(task.test(model))
        for sparsity in SPARSITIES:
            free[sparsity].append(measure(task, model, inventory, Choice("unstructured"), sparsity).accuracy)
            for size in SIZES:
                for permute in (False, True):
                    choice = Choice("group", {"size": size, "permute": permute})
                    cell = measure(task, model, inventory, choice, sparsity)
                    cells.setdefault((size, sparsity, permute), []).append(cell)
    write_page(given.output, "permutation", report(cells, dense, free, seeds))
    return 0


def measure(task: Task, dense: nn.Module, inventory: Inventory, choice: Choice, sparsity: float) -> Cell:
    start = time.perf_counter()
    masks = magnitude_masks(dense, inventory.layers, choice, sparsity)
    seconds = time.perf_counter() - start
    model = apply_masks_(copy.deepcopy(dense), masks)
    check(model, masks, PATTERNS.create(choice), choice)
    recalibrate_batch_norm_(model, task.calibration)
    kept, best = saliencies(dense, masks)
    return Cell(
        kept=sum(kept.values()) / sum(best.values()),
        by_layer={name: kept[name] / best[name] for name in masks},
        accuracy=task.test(model),
        seconds=seconds,
    )


def check(model: nn.Module, masks: Masks, pattern: Pattern, choice: Choice) -> None:
    """The packed form finds the groups again and stores no more than them, the last ones' padding aside."""
    for name, mask in masks.items():
        assert pattern.check(mask), name
        size = choice.args.get("size", 1)
        if len(mask) % size == 0 and torch.count_nonzero(weight_of(model, name)) == mask.sum():
            packed = pack(weight_of(model, name), size=size)
            assert packed.values.size == mask.sum(), name


def saliencies(dense: nn.Module, masks: Masks) -> tuple[dict[str, float], dict[str, float]]:
    """What the masks keep of each layer, and what the best ones of as many weights would."""
    kept, best = {}, {}
    for name, mask in masks.items():
        saliency: Tensor = weight_of(dense, name).detach().abs().double()
        kept[name] = float(saliency[mask].sum())
        best[name] = float(saliency.flatten().topk(int(mask.sum())).values.sum())
    return kept, best


def report(
    cells: dict[tuple[int, float, bool], list[Cell]], dense: list[float], free: dict[float, list[float]], seeds: int
) -> str:
    rows = []
    for sparsity in SPARSITIES:
        for size in SIZES:
            before, after = cells[size, sparsity, False], cells[size, sparsity, True]
            rows.append(
                [
                    f"{100 * sparsity:g}%",
                    str(size),
                    percent([cell.kept for cell in before]),
                    percent([cell.kept for cell in after]),
                    percent(free[sparsity]),
                    percent([cell.accuracy for cell in before]),
                    percent([cell.accuracy for cell in after]),
                    f"{statistics.fmean(cell.seconds for cell in after):.2f}",
                ]
            )
    before, after = (cells[*SHOWN, permute] for permute in (False, True))
    layers = [
        [name, percent([cell.by_layer[name] for cell in before]), percent([cell.by_layer[name] for cell in after])]
        for name in before[0].by_layer
    ]
    header = ("sparsity", "G", "kept", "kept, permuted", "accuracy, G=1", "accuracy", "accuracy, permuted", "seconds")
    return page(
        "Permuted groups",
        f"permutation --seeds {seeds}",
        f"Digits, {seeds} trained models (test accuracy {percent(dense)}), every layer pruned alike by magnitude. "
        "Kept: saliency over "
        "that of the best unstructured mask of as many weights. Accuracy: test split, right after pruning, batch "
        "norm measured "
        "again. Means over the models. Seconds: to make all of a model's permuted masks.",
        markdown_table(header, rows, left=0),
        f"Layer by layer, groups of {SHOWN[0]} at {100 * SHOWN[1]:g}%:",
        markdown_table(("layer", "kept", "kept, permuted"), layers),
        f"1 thread. {Provenance.here()}",
    )


def percent(shares: list[float]) -> str:
    return f"{100 * statistics.fmean(shares):.1f}%"
