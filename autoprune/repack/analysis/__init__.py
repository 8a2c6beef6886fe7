"""What a model costs, and which branches of it can go."""
