"""Attention to the keys that an indexer chooses: what AttentionCore does, to these alone."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention.core import AttentionCore, Heads
from model.attention.indexer import INDEXER_LOSS, Index, indexer_loss
from model.cache import Cache
from model.context import Context
from model.mask import Mask

INDEX_KEY = "k_index"  # the column of the indexer's keys


class ChosenCore(NamedTuple):
    """An AttentionCore that attends to what an indexer chooses; called as one."""

    core: AttentionCore
    index: Index

    def __call__(
        self,
        q: Tensor,
        fresh: Mapping[str, Tensor],
        ctx: Context,
        cache: Cache | None,
        keys_and_values: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
        v_dim: int | None = None,
    ) -> Heads:
        (*columns, k_index), mask = self.core.update({**fresh, INDEX_KEY: self.index.k}, ctx, cache)
        if self.index.gathers(ctx, cache):
            return self._gathered(q, (*columns, k_index), mask, ctx, keys_and_values, v_dim)
        if not self.index.warms_up and k_index.shape[1] > self.index.top_k:
            mask = mask.among(self.index.in_tiles(self.index.chosen, k_index, mask))
        k, v = columns if keys_and_values is None else keys_and_values(*columns)
        heads = self.core.attend_to(q, k, v, mask, ctx, v_dim)
        if INDEXER_LOSS not in ctx.collect:
            return heads
        biased_q, k, _ = self.core.add_position_bias(q, k, mask, self.core.scale)
        loss = indexer_loss(self.index, k_index, biased_q, k, mask, self.core.scale)
        return heads._replace(aux=heads.aux | {INDEXER_LOSS: loss})

    def _gathered(
        self,
        q: Tensor,
        columns: tuple[Tensor, ...],
        mask: Mask,
        ctx: Context,
        keys_and_values: Callable[..., tuple[Tensor, Tensor | None]] | None,
        v_dim: int | None,
    ) -> Heads:
        """Each query is a row of a batch of its own, with the columns of the top_k tokens it attends to."""
        *columns, k_index = columns
        batch, queries = q.shape[:2]
        q_pos, k_pos = mask.q_pos.expand(batch, -1), mask.k_pos.expand(batch, -1)
        sequence = torch.arange(batch, device=q.device)[:, None, None]
        width = sum(column[0, 0].numel() for column in columns)
        chosen_rows = self.index.in_tiles(self.index.chosen_rows, k_index, mask)  # (B, T, top_k)
        outputs = []
        for rows in self.index.tiles(queries, self.index.top_k, width + q.shape[2]):
            chosen = sequence, chosen_rows[:, rows]
            gathered = [column[chosen].flatten(0, 1) for column in columns]  # (B · t, top_k, ...)
            k, v = gathered if keys_and_values is None else keys_and_values(*gathered)
            of_tile = Mask(q_pos[:, rows].reshape(-1, 1), k_pos[chosen].flatten(0, 1), False, mask.pattern)
            found = self.core.attend_to(q[:, rows].reshape(-1, 1, *q.shape[2:]), k, v, of_tile, ctx, v_dim)
            outputs.append(found.out.unflatten(0, (batch, -1)).squeeze(2))
        return Heads(torch.cat(outputs, dim=1), {})
