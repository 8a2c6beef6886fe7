"""Ahead of time: a repacked model as an object file and a C library, for any processor."""
