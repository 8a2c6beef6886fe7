"""Locks, and worker processes that end with their parent."""
