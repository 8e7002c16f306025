"""What the model writes, for whoever watches it learn."""

from common.errors import NotFinite
from data.shards.prepare import Prepared
from data.tokenizers.base import Tokenizer
from generation.decode import generate
from generation.prompt import prompt_tokens
from generation.sampler import Sampler
from generation.state import GenerationState
from model.transformer import TransformerLM

MOST_TOKENS = 200
UNSET_TOKENS = 16


def preview_prompt(corpus: Prepared, prompt: str | None, context_length: int) -> list[int]:
    """What previews continue: the prompt; unset, the beginning of the validation text. Raises UserError as above."""
    if prompt is not None:
        return prompt_tokens(corpus.tokenizer, prompt, context_length)
    return corpus.val.read(0, min(UNSET_TOKENS, context_length // 2)).tolist()


def continuation(model: TransformerLM, tokenizer: Tokenizer, start: list[int], seed: int) -> str:
    """The start and what follows it. Draws from a generator of its own, so previews do not change training. An output
    that is not finite ends it in a line that says so."""
    sampler = Sampler(temperature=0.8, top_k=50)
    texts = GenerationState(model, [start], [seed])
    written, end = [*start], ""
    try:
        for step in generate(model, texts, sampler, max_new_tokens=MOST_TOKENS, end_token=tokenizer.end_of_text):
            written.append(int(step[0]))
    except NotFinite as error:
        end = f"\n[{error}]"
    return tokenizer.decode(written) + end
