"""The version, in the one place that the package, its files and its wheel read."""

__version__ = "0.1.0"
