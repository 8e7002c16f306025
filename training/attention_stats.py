"""Attention statistics during training: how sharp each layer's softmax is, and how large its scores grow."""

import torch
from torch import Tensor

from data.batches import count_windows, read_windows
from data.shards.token_files import TokenStream
from model.placement import Placement
from model.stats import MONITORED_STATS
from model.transformer import TransformerLM


@torch.no_grad()
def attention_stats(
    model: TransformerLM, stream: TokenStream, length: int, batch_size: int, document_start: int | None = None
) -> dict[str, float]:
    """Statistics over the stream's first windows, as many as evaluation reads at once. document_start: as Batch.of
    takes it. Per layer, as `attention/layer_0/entropy`:

    entropy           in nats, the mean over queries and heads: log n for even attention to n keys, 0 for a single one
    lowest_entropy    of the head where it is lowest: near 0, that head hardly learns any more
    max_logit         the largest score before the softmax; where it keeps growing, training becomes unstable
    """
    first = list(range(min(batch_size, count_windows(stream, length))))
    batch = read_windows(stream, length, first, document_start).to(next(model.parameters()).device)
    aux = model(batch.inputs, Placement.of_batch(batch), collect=MONITORED_STATS).aux
    stats = _by_layer(aux)
    values = torch.stack(list(stats.values())).tolist()  # one wait for the device
    return dict(zip(stats, values, strict=True))


def _by_layer(aux: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics of heads, as `layers.0.entropy` -> scalars of layers."""
    stats = {}
    for name, of_heads in aux.items():
        _, layer, statistic = name.split(".")
        layer = f"attention/layer_{layer}"
        if statistic == "entropy":
            stats[f"{layer}/entropy"] = of_heads.mean()
            stats[f"{layer}/lowest_entropy"] = of_heads.amin()
        else:
            stats[f"{layer}/max_logit"] = of_heads.amax()
    return stats
