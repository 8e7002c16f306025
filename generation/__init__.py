"""A trained model writes text: decoding, sampling, streaming."""
