"""Token files: built, read, looked up."""
