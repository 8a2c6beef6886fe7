"""Compiled ops in sequence."""
