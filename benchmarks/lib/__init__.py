"""What the benchmarks share: their command line, resumable rows, pages, provenance, magnitude masks."""
