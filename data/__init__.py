"""Data: documents -> tokens -> shards on disk -> batches."""
