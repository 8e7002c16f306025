"""Previews: text sampled from a model while it trains."""

from common.errors import NotFinite
from data.shards.prepare import Prepared
from data.tokenizers.base import Tokenizer
from generation.decode import generate
from generation.defaults import MAX_NEW_TOKENS
from generation.prompt import encode_prompt
from generation.sampler import Sampler
from generation.state import GenerationState
from model.transformer import TransformerLM

TOP_K = 50
DEFAULT_PROMPT_TOKENS = 16


def preview_prompt(corpus: Prepared, prompt: str | None, context_length: int) -> list[int]:
    """Tokenize the prompt of previews; unset, take the first tokens of the validation text. Raises UserError for a
    prompt that fills the context."""
    if prompt is not None:
        return encode_prompt(corpus.tokenizer, prompt, context_length)
    return corpus.val.read(0, min(DEFAULT_PROMPT_TOKENS, context_length // 2)).tolist()


def continuation(model: TransformerLM, tokenizer: Tokenizer, start: list[int], seed: int) -> str:
    """Sample a continuation -> its text, the start included. It uses its own random generator, so previews do not
    change training. Where the model's output is not finite, the text ends with a line that says so."""
    sampler = Sampler(top_k=TOP_K)
    state = GenerationState(model, [start], [seed])
    written = [*start]
    ending = ""
    try:
        for step in generate(model, state, sampler, max_new_tokens=MAX_NEW_TOKENS, end_token=tokenizer.end_of_text):
            written += step[0].tolist()
    except NotFinite as error:
        ending = f"\n[{error}]"
    return tokenizer.decode(written) + ending
