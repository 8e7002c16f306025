"""Turn a prompt into tokens."""

from common.errors import UserError
from data.tokenizers.base import Tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str, context_length: int, slide: bool | None = None) -> list[int]:
    """Tokenize a prompt verbatim; an empty one is the end-of-text token, which precedes every document. Raises
    UserError where the prompt leaves no room in a context that does not slide. slide: None where nobody can choose
    it."""
    tokens = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text]
    if len(tokens) >= context_length and not slide:
        way_out = "shorten it" if slide is None else "shorten it, or read its end with --context slide"
        most = context_length - 1
        raise UserError(f"the prompt has {len(tokens)} tokens, and {most} leave room in the context: {way_out}")
    return tokens
