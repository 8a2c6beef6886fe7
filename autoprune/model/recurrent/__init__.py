"""LSTM and GRU: names of their weights, their cells, their modules."""
