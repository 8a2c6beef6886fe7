"""Which grouping and tiling is the fastest here, and what layers take."""
