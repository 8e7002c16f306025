"""Token files: build, read, and an index of documents."""
