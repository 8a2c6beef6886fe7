"""What a run directory or a cache was made of: fingerprints of models, data and code."""
