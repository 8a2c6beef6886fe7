"""Latency: the timer, and the measured per-layer table with the identity of the machine it holds for."""
