"""A run: from a config to a report, stage by stage."""
