"""Numbers as 8-bit integers: their grids, and how ranges are found."""

from __future__ import annotations

from autoprune.quantization.fake import attach_, check_plain, dequantize_, grids_in, grids_of, unrounded
from autoprune.quantization.grid import LEVELS, WEIGHT_LEVELS, Grid, weight_scales
from autoprune.quantization.observer import Observer
from autoprune.quantization.ranges import METHODS, least_squares_weight_scales, on_scales

__all__ = [
    "LEVELS", "METHODS", "WEIGHT_LEVELS", "Grid", "Observer", "attach_", "check_plain", "dequantize_", "grids_in",
    "grids_of", "least_squares_weight_scales", "on_scales", "unrounded", "weight_scales",
]  # fmt: skip
