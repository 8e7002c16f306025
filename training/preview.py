"""What the model writes, for whoever watches it learn."""

from data.errors import UserError
from data.tokenizer import Tokenizer
from model.generate import ENDED, Sampler, generate
from model.transformer import TransformerLM

MOST_TOKENS = 200


def prompt_tokens(tokenizer: Tokenizer, prompt: str, context_length: int) -> list[int]:
    """A prompt verbatim; without one, the token that precedes every document. Raises UserError where the prompt leaves
    no room in the context."""
    tokens = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text]
    if len(tokens) >= context_length:
        raise UserError(f"the prompt has {len(tokens)} tokens, the context holds {context_length}: shorten it")
    return tokens


def continuation(model: TransformerLM, tokenizer: Tokenizer, prompt: str, seed: int) -> str:
    """The prompt and what follows it. Draws from a generator of its own, so previews do not change training."""
    start = prompt_tokens(tokenizer, prompt, model.config.context_length)
    sampler = Sampler(temperature=0.8, top_k=50)
    room = generate(model, [start], sampler, max_new_tokens=MOST_TOKENS, seeds=[seed], end_token=tokenizer.end_of_text)
    return prompt + tokenizer.decode(token for step in room if (token := int(step[0])) != ENDED)
