"""Documents -> tokens -> shards on disk -> batches."""
