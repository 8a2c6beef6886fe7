"""How small packed weights are in a file, and how fast they are read: ``python -m benchmarks encodings [RUN_DIR]``.

A layer of ResNet-18's shape at several sparsities, in groups of several sizes: bits a nonzero weight's position takes
in every encoding, what the file picks, and how fast it is decoded, on one thread. With a finished run's directory,
also the whole file of its model, with values of 32 and of 8 bits, and the test accuracy of each. Half a minute.

Writes benchmarks/results/encodings.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from autoprune.config import parse_config
from autoprune.files import read_json, write_tensors
from autoprune.masks import sparsity
from autoprune.model.weights import weight_of
from autoprune.patterns.group import Group
from autoprune.pipeline.run import Run
from autoprune.repack import PackedWeight, load, pack, save
from autoprune.repack.weights.encodings import CANDIDATES, ENCODINGS
from autoprune.repack.weights.serialized import VALUE_BITS, by_filter, by_group, restore, store
from autoprune.report.table import MISSING, markdown_table
from benchmarks.lib.command_line import command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance

MODEL = "## A whole model\n\n"
SHAPE = (512, 512, 3, 3)
SPARSITIES, GROUPS = (0.0, 0.5, 0.75, 0.9, 0.95, 0.98), (1, 8, 16)
ROUNDS = 9


def main(argv: Sequence[str]) -> int:
    parser = command_line("encodings", __doc__)
    parser.add_argument("run", type=Path, nargs="?", help="a finished run, e.g. runs/fashion_mnist")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    made, before = str(Provenance.here()), given.output / "encodings.md"
    parts = [
        f"## A layer of {' x '.join(map(str, SHAPE))}",
        "Bits that tell the position of one nonzero weight: told once a filter / once a group of filters. The file "
        "takes the smallest. Decoding: bytes of the packed float32 values, and of the dense weight they stand for, "
        "over the time from the file's tensors to the checked packed weight; one thread, medians.",
        layers(),
        made,
    ]
    if given.run is not None:
        parts += [MODEL + model(given.run), made]
    elif before.exists() and MODEL in (text := before.read_text(encoding="utf-8")):
        parts.append(MODEL + text.partition(MODEL)[2])  # as it was measured, with its machine
    write_page(given.output, "encodings", page("Packed weights in a file", "encodings [RUN_DIR]", "", *parts))
    return 0


def layers() -> str:
    generator, rows = torch.Generator().manual_seed(0), []
    for size in GROUPS:
        for share in SPARSITIES:
            weight = torch.randn(SHAPE, generator=generator)
            packed = pack(weight * Group(size).mask(weight.abs(), share), size=size)
            grids, nonzero = (by_filter(packed)[0], by_group(packed)[0]), int((packed.values != 0).sum())
            bits = []
            for choice in CANDIDATES:
                both = [ENCODINGS.create(choice).bits(cells) for cells in grids]
                bits.append("/".join(MISSING if each is None else f"{each / nonzero:.2f}" for each in both))
            decoded = [_decoded(packed, value_bits) for value_bits in VALUE_BITS]
            rows.append((
                str(size), f"{100 * share:.0f}%", *bits, str(store(packed).about["encoding"]["name"]),
                *(f"{4 * weight.numel() / store(packed, value_bits).bytes:.1f}x" for value_bits in VALUE_BITS),
                *(f"{packed.values.nbytes / seconds / 1e9:.2f} / {4 * weight.numel() / seconds / 1e9:.2f}"
                  for seconds in decoded),
            ))  # fmt: skip
    header = ("G", "zeros", *map(str, CANDIDATES), "picked", *(f"smaller, {bits} bit" for bits in VALUE_BITS),
              *(f"decoded GB/s, {bits} bit" for bits in VALUE_BITS))  # fmt: skip
    return markdown_table(header, rows)


def _decoded(packed: PackedWeight, value_bits: int) -> float:
    """Seconds to decode a stored weight."""
    stored, took = store(packed, value_bits), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        restore(stored.about, stored.tensors)
        took.append(time.perf_counter() - start)
    return median(took)


def model(directory: Path) -> str:
    path = directory / "config.json"
    run = Run(parse_config(read_json(path, "the run's config"), str(path)), directory)
    masked, names = run.masked, run.prepared.inventory.names
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.safetensors"
        write_tensors(dense, run.prepared.dense.state_dict())
        whole = dense.stat().st_size
        rows.append(("dense", f"{whole:,}", "1.0x", f"{100 * run.task.test(run.prepared.dense):.2f}%"))
        for value_bits in VALUE_BITS:
            packed = Path(folder) / f"{value_bits}.safetensors"
            save(run.repacked, packed, value_bits=value_bits)
            size, accuracy = packed.stat().st_size, run.task.test(load(packed))
            rows.append((f"repacked, {value_bits} bit", f"{size:,}", f"{whole / size:.1f}x", f"{100 * accuracy:.2f}%"))
    weights = {name: weight_of(masked, name) for name in names}
    zeros = sum(sparsity(weight) * weight.numel() for weight in weights.values())
    share = zeros / sum(weight.numel() for weight in weights.values())
    about = f"{run.config.task}, {100 * share:.1f}% zeros, pattern {run.config.env.pattern}, {run.plan.training}.\n\n"
    return about + markdown_table(("file", "bytes", "smaller", "test accuracy"), rows)
