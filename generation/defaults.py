"""Defaults of sampling: those of a Sampler, which sample.py's flags have too. Imports nothing heavy: --help states
them."""

SAMPLING = {
    "repetition_penalty": 1.0,  # none
    "temperature": 0.8,
    "top_k": None,
    "top_p": None,
    "min_p": None,
}
MAX_NEW_TOKENS = 200  # of a text, or of a turn
