"""The captured model: operations, their meaning, checks and rewrites."""
