"""Text generation with a trained model: decoding, sampling, streaming, scoring."""
