"""Packed weights, in memory and in files."""
