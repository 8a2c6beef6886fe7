"""From a graph to native steps, buffers and their places."""
