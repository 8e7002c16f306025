"""Self-speculation: draft one token by the model's own module of multi-token prediction (model/mtp.py), and keep it
where the model draws it too (DeepSeek-V3, arXiv:2412.19437, section 5.4.3).

The module reads, for each place i, the residual stream of the model and the token after it, and predicts the one after
that. So the last token of a text, just drawn, is enough to draft the next, which the model then checks in the pass over
that last token. Drafts are drawn with the noise that the model draws with: where both agree on the distribution, they
agree on the token.

The module has a KV cache of its own. It reads tokens of the text alone, never its drafts: one that is refused leaves
nothing there to be taken back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from generation.decode import last_hidden, tile_of
from generation.sampler import NO_TOKEN
from generation.speculative import PAYS_FROM, Draw, Speculation
from model.cache import Cache, FullCache
from model.placement import PADDING_POSITION, Placement
from model.transformer import TransformerLM

STREAM = "stream"


class SelfSpeculation(Speculation):
    """Drafts at most one token of a row in each pass, whatever became of those before."""

    reads_hidden = True
    pays_from = PAYS_FROM  # of a batch too
    shortfall = "too few of the drafted tokens are what the model writes, which is done sooner without it"

    def __init__(self, model: TransformerLM, batch_size: int):
        super().__init__(batch_size)
        self.limits = [1] * batch_size
        self.model = model
        # The stream of each place is kept until the module has read it: half of what a layer's keys and values take.
        self.streams = FullCache(batch_size, 1, {STREAM: (model.config.d_model,)}, model.embedding.weight)
        self.mtp_cache = model.make_mtp_cache(batch_size, 1)
        self.num_read = self.streams.sequences.new_zeros(batch_size)  # (B,) places in the module's cache

    @property
    def caches(self) -> Sequence[Cache]:
        return self.streams, self.mtp_cache

    def observe(self, at: Placement, stream: Tensor) -> None:
        """Keep the stream (B, T, d). What the module has read of these places, and of what followed them, is void."""
        self.streams.update(at, **{STREAM: stream})
        first = at.positions.where(at.positions >= 0, torch.iinfo(torch.int64).max).amin(1)
        self.num_read = self.num_read.minimum(first)

    def drafts(self, tokens: Tensor, lengths: Tensor, rooms: Sequence[int], draw: Draw) -> list[list[int]]:
        allowed = lengths.new_tensor([self.allowed(row, room) for row, room in enumerate(rooms)])
        unread = (lengths - 1 - self.num_read).clamp(min=0) * (allowed > 0)  # (B,) places
        if not unread.any():
            return [[] for _ in rooms]
        drawn = draw(self._logits(tokens, unread)).where(unread > 0, NO_TOKEN)
        return [[] if one == NO_TOKEN else [one] for one in drawn.tolist()]

    def limit_after(self, limit: float, drafted: int, accepted: int) -> float:
        return max(limit, 1) if accepted else limit

    def _logits(self, tokens: Tensor, unread: Tensor) -> Tensor:
        """The module's logits (B, V) at the last of the next `unread` (B,) places of each row, which it reads."""
        new, kv_len = int(unread.max()), int((self.num_read + unread).max())
        last = None  # (B, 1, d)
        for start in range(0, new, tile := tile_of(len(tokens))):
            ahead = torch.arange(start, min(start + tile, new), device=tokens.device)
            index = (self.num_read[:, None] + ahead).clamp(max=kv_len - 1)  # (B, T)
            at = Placement.decode(index.where(ahead < unread[:, None], PADDING_POSITION), [self.mtp_cache], kv_len)
            stream = self.streams.columns[STREAM][self.streams.sequences, 1 + index]
            x = self.model.look_ahead(stream, tokens.gather(1, index + 1), at).x
            last = last_hidden(last, x, unread - 1 - start)
        self.num_read = self.num_read + unread
        return self.model.logits(last)[:, 0]
