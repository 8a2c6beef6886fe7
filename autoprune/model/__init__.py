"""What is known of a model: its layers, its inputs, and copies that may be changed."""
