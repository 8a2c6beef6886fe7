"""Evaluation: a plan becomes a measured accuracy and a measured latency. Knows no reinforcement learning."""
