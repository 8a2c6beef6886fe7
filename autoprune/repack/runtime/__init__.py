"""Programs that are called: memory, threads, bound inputs."""
