"""Autoregressive decoding through KV caches: the one loop for every attention."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import NotFinite
from generation.compiled_step import bucket
from generation.sampler import NO_TOKEN, Sampler
from generation.state import ENDED, GenerationState, Step
from model.cache import Cache
from model.flat_model import FlatModel
from model.placement import PADDING_POSITION, Placement
from model.transformer import TransformerLM

TILE = 2048  # tokens of all rows that a prefill computes at one time
MIN_TILE = 256  # of one row


@torch.no_grad()
def generate(
    model: TransformerLM, state: GenerationState, sampler: Sampler, *, max_new_tokens: int, end_token: int | None = None
) -> Iterator[Tensor]:
    """Generate text: yield the next tokens of every row, (B, k) int64 on the CPU (k is 1), up to max_new_tokens times,
    after appending them to `state`.

    A row's text does not depend on the other rows of the batch (except where two tokens are equally likely up to
    rounding, which bfloat16 has a lot of). It ends after `end_token`, which is yielded, when its context is full, or
    when the caller ends it (`state.end`); from then on ENDED is yielded for it. When all rows have ended, the iteration
    ends. A row for which the model's output is no distribution ends too (`state.rows.not_finite`); the others go on,
    and NotFinite is raised at the end of the iteration.

    A GPU computes the next step while the caller reads the tokens of this one: nothing is read back but these, late.
    What the caller's changes to `state` make void is computed again. The weights must not change meanwhile.

    Where `state` speculates, each row is given up to max_new_tokens tokens, and ENDED stands for those that it is not
    given yet too.
    """
    state.discard_ahead()
    state.flat = None
    if state.compiled is not None:
        _make_room(state, int(state.rows.lengths.max()) + state.compiled.tokens)
    state.rows = state.rows._replace(not_finite=torch.zeros_like(state.rows.not_finite))
    if state.speculation is not None:
        yield from _speculate(model, state, sampler, max_new_tokens, end_token)
        return _check_finite(state)
    for left in reversed(range(max_new_tokens)):
        step = state.ahead or _begin(model, state, sampler, end_token)
        if step is None:
            break
        state.rows = step.rows
        state.ahead = None
        if left and _can_look_ahead(state):
            state.ahead = _begin(model, state, sampler, end_token)
            state.rows = step.rows
        tokens, alive = step.read()
        if sum(alive) < step.live:
            state.forget_known()
        if (tokens == ENDED).all():
            break
        yield tokens
    state.discard_ahead()
    _check_finite(state)


def _check_finite(state: GenerationState) -> None:
    broken = state.rows.not_finite.nonzero()[:, 0].tolist()
    if broken:
        which = f" of text {broken[0] + 1}" if len(state.tokens) > 1 else ""
        length = int(state.rows.lengths[broken[0]])
        raise NotFinite(f"the model's output is not finite after {length} tokens{which}")


def _can_look_ahead(state: GenerationState) -> bool:
    """Whether the next step can be begun before the tokens of this one were read: on a GPU, which goes on while Python
    waits, and where no row's context will be full, which would shift its text."""
    known = state.rows.known
    return works_alone(state.tokens.device) and known is not None and known.longest + 1 < state.context_length


def works_alone(device: torch.device) -> bool:
    """Whether the device computes while Python goes on."""
    return device.type == "cuda"


def _begin(model: TransformerLM, state: GenerationState, sampler: Sampler, end_token: int | None) -> Step | None:
    """Begin a step: compute, sample and append the next token of every row. None if no row is alive."""
    if state.rows.known is None:
        state.rows = state.rows.read_back()
    if not state.rows.known.live:
        return None
    logits = next_logits(model, state)
    seen = _seen(model, state, sampler)
    sampled = sampler(logits, state.rows.seeds, state.indices, seen)
    live = state.rows.known.live
    tokens = state.append_sampled(sampled, end_token)
    return Step(state.rows, tokens, live)


def _speculate(
    model: TransformerLM, state: GenerationState, sampler: Sampler, max_new_tokens: int, end_token: int | None
) -> Iterator[Tensor]:
    """`generate`, with one pass for several tokens of a row where these are what it drafted. They are appended and
    yielded one by one all the same, so the caller may change `state` after each: the rest of the pass is void then.

    A GPU does not look ahead here: what is drafted next depends on the tokens of this pass.
    """
    left = [max_new_tokens] * len(state.tokens)
    state.forget_known()
    while any(wanted := [n if alive else 0 for n, alive in zip(left, state.rows.alive.tolist(), strict=True)]):
        draws, kept = _draw_and_judge(model, state, sampler, wanted, end_token)
        for place in range(max(kept)):
            grows = None if place < min(kept) else draws.new_tensor([place < n for n in kept], dtype=torch.bool)
            tokens = state.append_sampled(draws[:, place], end_token, grows).cpu()
            left = [n - grew for n, grew in zip(left, (tokens != ENDED).tolist(), strict=True)]
            if (tokens != ENDED).any():
                yield tokens[:, None]
            if state.rows.known is None:  # the caller changed a row, or its context is full
                break
        if min(kept) < max(kept):
            state.forget_known()


def _draw_and_judge(
    model: TransformerLM, state: GenerationState, sampler: Sampler, wanted: list[int], end_token: int | None
) -> tuple[Tensor, list[int]]:
    """Draw tokens (B, 1 + drafts) behind the text of each row, and count those that are to be appended: up to `wanted`,
    none where that is 0."""
    if state.rows.known is None:
        state.rows = state.rows.read_back()
    for cache in state.caches or []:
        cache.rewind(state.rows.num_cached)  # what the last pass drafted in vain
    drafts = _drafts(model, state, sampler, wanted)
    draws = _draw(model, state, sampler, drafts)
    state.speculation.passes += 1
    if any(drafts) and (draws[draws.new_tensor(wanted) > 0] == NO_TOKEN).any():
        # A text has no token after this, and a draft shall not leave what is not finite in the caches: 0 · NaN is NaN.
        state.speculation.draft_little()
        state.caches = model.make_caches(len(wanted), min(cache.capacity for cache in state.caches))
        state.flat = None
        state.rows = state.rows._replace(num_cached=torch.zeros_like(state.rows.num_cached)).read_back()
        drafts = [[] for _ in wanted]
        draws = _draw(model, state, sampler, drafts)
    judge = state.speculation.judge
    rows = enumerate(zip(draws.tolist(), drafts, strict=True))
    return draws, [judge(row, drawn, drafted, end_token) if wanted[row] else 0 for row, (drawn, drafted) in rows]


def _drafts(model: TransformerLM, state: GenerationState, sampler: Sampler, wanted: list[int]) -> list[list[int]]:
    """Draft tokens for each row, as many as it may write before the last that is wanted of it."""
    rows = state.rows
    if state.caches is None or rows.known.new != 1:  # what is new comes first
        return [[] for _ in wanted]

    _make_room(state, rows.known.longest)

    def draw(logits: Tensor) -> Tensor:
        return sampler(logits, rows.seeds, state.indices, _seen(model, state, sampler))

    most = min(cache.max_rewind for cache in state.caches)
    lengths = rows.lengths.tolist()
    rooms = [min(n, state.context_length - length, most + 1) - 1 for n, length in zip(wanted, lengths, strict=True)]
    return state.speculation.drafts(state.tokens, rows.lengths, rooms, draw)


def _seen(model: TransformerLM, state: GenerationState, sampler: Sampler) -> Tensor | None:
    """The tokens in each row's context (B, V), where the sampler asks for them."""
    return state.seen_tokens(model.vocab_size) if sampler.repetition_penalty != 1 else None


def _draw(model: TransformerLM, state: GenerationState, sampler: Sampler, drafts: list[list[int]]) -> Tensor:
    """Draw the token after each row's text, and after each of its drafts if they follow the text: (B, 1 + longest
    draft)."""
    rows = state.rows
    seen = _seen(model, state, sampler)
    longest = max(map(len, drafts))
    if not longest:
        return sampler(next_logits(model, state), rows.seeds, state.indices, seen)[:, None]
    padded = rows.lengths.new_tensor([draft + [0] * (longest - len(draft)) for draft in drafts])
    if seen is not None:  # behind a draft, it was seen too
        drafted = F.one_hot(padded, model.vocab_size).cumsum(1).bool()
        seen = (seen[:, None] | F.pad(drafted, (0, 0, 1, 0))).flatten(0, 1)
    ahead = torch.arange(1 + longest, device=padded.device)
    exists = (ahead <= rows.lengths.new_tensor([len(draft) for draft in drafts])[:, None]) & rows.alive[:, None]
    positions = (rows.num_cached[:, None] + ahead).where(exists, PADDING_POSITION)  # (B, T)
    tokens = torch.cat((state.tokens.gather(1, rows.lengths[:, None] - 1), padded), 1)
    kv_len = rows.known.longest + longest
    _make_room(state, kv_len)
    at = Placement.decode(positions, state.caches, kv_len, state.context_length)
    logits = model.logits(_hidden(model, state, tokens, at))  # (B, T, V)
    indices = state.indices[:, None] + ahead
    seeds = rows.seeds.repeat_interleave(len(ahead))
    return sampler(logits.flatten(0, 1), seeds, indices.flatten(), seen).view_as(indices)


def next_logits(model: TransformerLM, state: GenerationState) -> Tensor:
    """Logits (B, V) after each live row's last token, computed from the tokens that are not in the KV caches yet, and
    cache these."""
    rows = state.rows
    known = rows.known
    _make_room(state, known.longest)
    if state.caches is None or known.fresh:
        return _prefill(model, state)
    if state.compiled is None or known.new > 1 or _reads_hidden(state):
        return _eager_step(model, state)
    eager = functools.partial(_eager_step, model, state)
    flat = _flat(model, state)
    if flat is not None:
        return state.compiled(flat, _last_tokens(state), None, state.caches, known.longest, eager)
    return state.compiled(model, *_new_tokens(state), state.caches, known.longest, eager)


def _eager_step(model: TransformerLM, state: GenerationState) -> Tensor:
    """The logits of next_logits, where caches hold all but the last tokens."""
    known = state.rows.known
    flat = _flat(model, state)
    if flat is not None:
        return flat(_last_tokens(state), known.longest - 1)
    tokens, positions = _new_tokens(state)
    index = (positions >= 0).sum(1) - 1  # of each row's last token; of an ended row -1
    last = None  # (B, 1, d) hidden states of these
    for start in range(0, known.new, tile := tile_of(len(tokens))):
        here = positions[:, start : start + tile]
        at = Placement.decode(here, state.caches, known.longest, state.context_length)
        x = _hidden(model, state, tokens[:, start : start + tile], at)
        last = last_hidden(last, x, index - start)
    return model.logits(last)[:, 0]


def _hidden(model: TransformerLM, state: GenerationState, tokens: Tensor, at: Placement) -> Tensor:
    """Hidden states (B, T, d), after what drafts from the pass has seen it."""
    hidden = model(tokens, at)
    if state.speculation is not None:
        state.speculation.observe(at, hidden.stream)
    return hidden.x


def _reads_hidden(state: GenerationState) -> bool:
    """Whether drafts are made of what a pass returns beside its logits: then no step for one token is taken that
    returns these alone."""
    return state.speculation is not None and state.speculation.reads_hidden


def _flat(model: TransformerLM, state: GenerationState) -> FlatModel | None:
    """The step for one token of every row at one position, where that is what is to be computed, and there is one."""
    known = state.rows.known
    return state.flat_model(model) if known.aligned and known.new == 1 and not _reads_hidden(state) else None


def _last_tokens(state: GenerationState) -> Tensor:
    """(B, 1), where all rows are equally long."""
    return state.tokens[:, state.rows.known.longest - 1, None]


def _new_tokens(state: GenerationState) -> tuple[Tensor, Tensor]:
    """The tokens that are not in the KV caches yet, and their positions: (B, T) each, padded on the right."""
    rows, new = state.rows, state.rows.known.new
    ahead = torch.arange(new, device=rows.lengths.device)
    index = rows.num_cached[:, None] + ahead
    count = (rows.lengths - rows.num_cached) * rows.alive
    positions = index.where(ahead < count[:, None], PADDING_POSITION)
    return state.tokens.gather(1, index.clamp(max=state.context_length)), positions


def _make_room(state: GenerationState, length: int) -> None:
    """Grow the KV caches that do not hold a text of that length, or a full context."""
    length = min(length, state.context_length)
    for cache in (*(state.caches or ()), *(state.speculation.caches if state.speculation else ())):
        if cache.capacity < length:
            cache.grow(bucket(length))
            state.flat = None


def _prefill(model: TransformerLM, state: GenerationState) -> Tensor:
    """Logits (B, V) after each row's last token from the whole text, filling the KV caches where there are any: a long
    text in tiles, so that what is computed besides takes no more memory than a tile.

    Rows shorter than the longest are padded on the right, so that no real token sees the padding.
    """
    text, lengths, caches = state.tokens, state.rows.lengths, state.caches
    longest = int(lengths.max())
    tile = longest if caches is None else tile_of(len(text))
    last = None  # (B, 1, d) hidden states of each row's last token
    for start in range(0, longest, tile):
        at = _placement_of_tile(lengths, start, min(start + tile, longest), caches)
        x = _hidden(model, state, text[:, start : start + at.positions.shape[1]], at)
        last = last_hidden(last, x, lengths - 1 - start)
    return model.logits(last)[:, 0]


def tile_of(rows: int) -> int:
    """How many tokens of each row are read at one time."""
    return max(MIN_TILE, TILE // rows)


def last_hidden(before: Tensor | None, x: Tensor, index: Tensor) -> Tensor:
    """Hidden states (B, 1, d) of each row's last token, whose index in a tile x (B, T, d) is `index` (B,): negative
    where it stood in a tile before."""
    found = x.take_along_dim(index.clamp(0, x.shape[1] - 1)[:, None, None], dim=1)
    return found if before is None else found.where((index >= 0)[:, None, None], before)


def _placement_of_tile(lengths: Tensor, start: int, stop: int, caches: list[Cache] | None) -> Placement:
    """Where the tokens from start to stop of each row stand."""
    if start == 0:
        return Placement.prefill(lengths.clamp(max=stop), caches)
    positions = torch.arange(start, stop, device=lengths.device)[None]
    if (lengths < stop).any():
        positions = positions.where(positions < lengths[:, None], PADDING_POSITION)
    return Placement.decode(positions, caches, kv_len=stop)
