"""Attention maps of a trained model as a picture: which tokens of a text each head attends to.

python sample.py "def solve(x):" --attention-map map.png
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import NotFinite, UserError, escaped
from common.figures import save
from data.tokenizers.base import Tokenizer
from model.stats import ATTENTION_MAP
from model.transformer import TransformerLM

MAX_TOKENS = 256  # with more, a cell is smaller than a pixel
MAX_LABELS = 32  # tokens that are written beside the cells
MAX_LABEL_LENGTH = 10  # characters of a token


def draw_attention(model: TransformerLM, tokenizer: Tokenizer, text: str, path: Path, name: str) -> None:
    """Draw the attention map of every layer (a row of the picture) and head (a column) on a text, which is tokenized as
    it is. name: the run's, for the title. Raises UserError for a text that is too
    short or too long, and NotFinite for attention that is no number."""
    tokens = tokenizer.encode(text).tolist()
    most = min(MAX_TOKENS, model.config.context_length)
    if not 2 <= len(tokens) <= most:
        raise UserError(
            f"--attention-map draws a prompt of 2 to {most} tokens, this one has {len(tokens)}: "
            f"give a {'longer' if len(tokens) < 2 else 'shorter'} one"
        )
    maps = attention_maps(model, tokens)
    if not maps.isfinite().all():
        layer, head, token, _ = (~maps.isfinite()).nonzero()[0].tolist()
        raise NotFinite(f"the attention of layer {layer}, head {head} is not finite from token {token + 1} on")
    texts = [tokenizer.decode_bytes([token]).decode(errors="replace") for token in tokens]
    labels = list(map(_label, texts)) if len(texts) <= MAX_LABELS else None
    _draw(maps, labels, name, path)


@torch.no_grad()
def attention_maps(model: TransformerLM, tokens: list[int]) -> Tensor:
    """Attention probabilities (layers, heads, T, T): row i of each is how token i spreads its attention
    over the tokens up to itself."""
    inputs = torch.tensor([tokens], device=next(model.parameters()).device)
    aux = model(inputs, collect=frozenset({ATTENTION_MAP})).aux
    return torch.stack([aux[f"layers.{i}.{ATTENTION_MAP}"][0] for i in range(len(model.layers))]).cpu()


def _label(text: str) -> str:
    """A token's text on one line, spaces visible."""
    text = repr(text)[1:-1].replace(" ", "·")
    return text if len(text) <= MAX_LABEL_LENGTH else text[: MAX_LABEL_LENGTH - 1] + "…"


def _draw(maps: Tensor, labels: list[str] | None, name: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import PowerNorm

    n_layers, n_heads, length, _ = maps.shape
    panel = max(1.6, 0.11 * length if labels else min(3.0, length / 60))  # inches
    size = (max(6.0, panel * n_heads + 1.2), panel * n_layers + 0.8)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    # All maps as one image, for a hundred axes take half a minute. What cannot be seen has no probability at all, not a
    # small one, and is gray.
    gap = 1 + length // 16  # cells between two maps
    pitch = length + gap
    bordered = np.pad(maps.numpy(), ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=-1)
    image = bordered.transpose(0, 2, 1, 3).reshape(n_layers * pitch, n_heads * pitch)[:-gap, :-gap]
    colors = plt.get_cmap("magma_r").with_extremes(bad="0.92", under="white")
    norm = PowerNorm(0.5, 0, 1)  # or all that is not near 1 would look alike
    picture = axes.imshow(np.ma.masked_equal(image, 0), cmap=colors, norm=norm, aspect="equal")
    axes.spines[:].set_visible(False)

    ticks = np.arange(0, length, 1 if labels else 10 * -(-length // 50))
    fonts = {"fontsize": 6, "fontfamily": "monospace", "parse_math": False}
    for count, set_ticks, turned in ((n_heads, axes.set_xticks, {"rotation": 90}), (n_layers, axes.set_yticks, {})):
        texts = labels or [str(tick) for tick in ticks]
        set_ticks([i * pitch + tick for i in range(count) for tick in ticks], texts * count, **fonts, **turned)
    axes.tick_params(length=1.5)
    heads = axes.secondary_xaxis("top")
    layers = axes.secondary_yaxis("right")
    middle = (length - 1) / 2
    heads.set_xticks([i * pitch + middle for i in range(n_heads)], [f"head {i}" for i in range(n_heads)])
    layers.set_yticks(
        [i * pitch + middle for i in range(n_layers)], [f"layer {i}" for i in range(n_layers)], rotation=90, va="center"
    )
    for side in (heads, layers):
        side.spines[:].set_visible(False)
        side.tick_params(length=0, labelsize=8)
    title = f"{escaped(name)}: how each token (row) attends to those it sees (column)"
    figure.suptitle(title, fontsize=10, parse_math=False)
    bar = figure.colorbar(picture, ax=axes, shrink=min(1.0, 4.0 / n_layers), aspect=30)
    bar.set_label("probability", fontsize=8)
    bar.ax.tick_params(labelsize=6)
    save(figure, path)
    plt.close(figure)
