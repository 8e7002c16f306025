"""The language model: weights and pure functions. Knows nothing of data, training or configuration files."""
