"""What `autoprune init` copies: a config and a module that run as they stand."""
