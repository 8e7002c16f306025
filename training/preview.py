"""What the model writes, for whoever watches it learn."""

from common.errors import NotFinite, UserError
from data.shards.prepare import Prepared
from data.tokenizers.tokenizer import Tokenizer
from model.generate import Texts, generate
from model.sampler import Sampler
from model.transformer import TransformerLM

MOST_TOKENS = 200
UNSET_TOKENS = 16


def prompt_tokens(tokenizer: Tokenizer, prompt: str, context_length: int, slide: bool | None = None) -> list[int]:
    """A prompt verbatim; without one, the token that precedes every document. Raises UserError where the prompt leaves
    no room in a context that does not slide. slide: None where nobody can choose it."""
    tokens = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text]
    if len(tokens) >= context_length and not slide:
        way_out = "shorten it" if slide is None else "shorten it, or read its end with --context slide"
        raise UserError(f"the prompt has {len(tokens)} tokens, the context holds {context_length}: {way_out}")
    return tokens


def preview_prompt(corpus: Prepared, prompt: str | None, context_length: int) -> list[int]:
    """What previews continue: the prompt; unset, the beginning of the validation text. Raises UserError as above."""
    if prompt is not None:
        return prompt_tokens(corpus.tokenizer, prompt, context_length)
    return corpus.val.read(0, min(UNSET_TOKENS, context_length // 2)).tolist()


def continuation(model: TransformerLM, tokenizer: Tokenizer, start: list[int], seed: int) -> str:
    """The start and what follows it. Draws from a generator of its own, so previews do not change training. An output
    that is not finite ends it in a line that says so."""
    sampler = Sampler(temperature=0.8, top_k=50)
    texts = Texts(model, [start], [seed])
    written, end = [*start], ""
    try:
        for step in generate(model, texts, sampler, max_new_tokens=MOST_TOKENS, end_token=tokenizer.end_of_text):
            written.append(int(step[0]))
    except NotFinite as error:
        end = f"\n[{error}]"
    return tokenizer.decode(written) + end
