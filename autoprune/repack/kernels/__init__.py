"""Packed kernels: LLVM IR built with llvmlite and compiled for the host the first time a shape is needed."""
