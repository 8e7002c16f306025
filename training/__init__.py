"""Training a model on a corpus. Uses common/, model/, data/ and runtime/."""
