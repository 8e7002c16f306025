"""Published models, in the format of Hugging Face's transformers: which settings they have, and under which names."""
