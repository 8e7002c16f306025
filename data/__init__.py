"""Documents -> tokens -> memory-mapped shards -> batches."""
