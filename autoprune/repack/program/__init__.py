"""The whole-model program: a model captured as a small graph of our own, simplified, and run by native kernels."""
