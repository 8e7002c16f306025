"""Probes of in-context copying: they tell sooner than the loss, and why, what an attention has learned.

python -m ablation.probes runs/A runs/B                  # in the checkout; prints a table, a row for each run
python -m ablation.probes runs/A --every-checkpoint      # and one for each checkpoint that the run has stored

An induction head completes a pattern: where the tokens A B stood before, and A comes again, it attends to B and
predicts it. It takes two layers: a previous-token head writes to each token which one stood before it, and the
induction head finds by that the token after the earlier A (Olsson et al. 2022, arXiv:2209.11895). Columns:

    loss                nats per token of the first --tokens validation tokens
    seen, new           the same, of the tokens that the bigram (input, target) predicts, because it stood before in the
                        same window, and of the others; `share` is how many are seen
    repeat, accuracy    nats per token, and share of right predictions, in the second half of random tokens repeated
                        once: without induction log(vocabulary) or more, and 1 / vocabulary
    previous            highest score of a head, with its place as layer.head from 0: mean attention to the token before
    matching            likewise: on validation text, mean attention to the tokens that followed earlier occurrences of
                        the query's own token, where there are any; early in training it rises long before `induction`
    induction           likewise: on repeated random tokens, mean attention to the token after the earlier occurrence
"""

if __name__ == "__main__":
    from common import process

    process.start("torch", "pydantic", "rich")

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import process
from common.cli import Parser, number, one_line_errors
from common.errors import UserError
from common.streams import show
from data.batches import Batch, evaluation_batches
from data.shards.prepare import Prepared, prepare
from model.score import token_losses
from model.stats import ATTENTION_MAP
from model.transformer import TransformerLM
from training.run import checkpoint
from training.run.folder import check_is_run, checkpoint_paths

PROGRAM = "-m ablation.probes"
MAX_LENGTH = 256  # tokens of a text whose attention maps are in memory
TEXTS = 16  # of the attention maps
BATCH = 16  # windows, or texts, in a forward pass
Batches = Iterable[Callable[[], Batch]]


class Kinds(NamedTuple):
    """Loss by kind of token, in nats per token."""

    loss: float  # of all
    seen: float  # of targets whose bigram stood before in the window
    new: float  # of the others
    share: float  # of seen targets among all


class Copying(NamedTuple):
    """Predictions in the second half of repeated random tokens."""

    loss: float  # nats per token
    accuracy: float


class Probes(NamedTuple):
    """Everything that is measured of one model."""

    kinds: Kinds
    copying: Copying
    previous: Tensor  # (L, H)
    matching: Tensor  # (L, H)
    induction: Tensor  # (L, H)


def bigram_seen(inputs: Tensor, targets: Tensor) -> Tensor:
    """Whether the bigram (inputs[t], targets[t]) stood before in its window, as (inputs[s], targets[s]) with s < t:
    (B, T) each -> (B, T) bool."""
    same = (inputs[:, :, None] == inputs[:, None]) & (targets[:, :, None] == targets[:, None])  # (B, T, S)
    return same.tril(-1).any(-1)


@torch.no_grad()
def losses_by_kind(model: TransformerLM, batches: Batches) -> Kinds:
    """Mean loss over batches of validation windows, of all tokens and by kind; NaN for a kind that does not occur."""
    nats = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    for read in batches:
        batch = read()
        losses = token_losses(model, batch).double()
        seen = bigram_seen(batch.inputs, batch.targets)
        for kind, chosen in enumerate((seen, ~seen)):
            nats[kind] += losses[chosen].sum()
            counts[kind] += chosen.sum()
    seen_loss, new_loss = (nats / counts).tolist()
    share = (counts[0] / counts.sum()).item()
    return Kinds((nats.sum() / counts.sum()).item(), seen_loss, new_loss, share)


def repeated_tokens(vocab_size: int, half: int, texts: int, seed: int = 0) -> Tensor:
    """Uniformly random tokens, each text repeated once: (texts, 2 · half) int64. The same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (texts, half), generator=draw).repeat(1, 2)


@torch.no_grad()
def copying(model: TransformerLM, repeated: Tensor) -> Copying:
    """Score the predictions of tokens half + 1 ... 2 · half - 1 of `repeated_tokens` (B, 2 · half): the first token of
    the second half cannot be foreseen."""
    half = repeated.shape[1] // 2
    losses = []
    right = []
    for texts in repeated.split(BATCH):
        targets = texts[:, half + 1 :]
        logits = model.logits(model(texts[:, :-1]).x[:, half:]).float()  # (B, half - 1, V)
        losses.append(-logits.log_softmax(-1).gather(-1, targets[..., None]).flatten())
        right.append((logits.argmax(-1) == targets).flatten())
    return Copying(torch.cat(losses).mean().item(), torch.cat(right).float().mean().item())


def previous_token_scores(model: TransformerLM, tokens: Tensor) -> Tensor:
    """Mean attention of each head to the token before its own, from token 1 on: (B, T) -> (L, H), between 0 and 1."""
    index = torch.arange(1, tokens.shape[1])
    return _attention_to(model, tokens, lambda text: _at(len(text), index, index - 1))


def matching_scores(model: TransformerLM, tokens: Tensor) -> Tensor:
    """Mean attention of each head to the tokens that followed earlier occurrences of the query's own token, over the
    queries that have any: P[t, s] summed over s <= t with tokens[s - 1] = tokens[t]; (B, T) -> (L, H), between 0 and 1.
    It is the prefix-matching score of Olsson et al. on real text."""
    return _attention_to(model, tokens, _follows_an_earlier_occurrence)


def induction_scores(model: TransformerLM, repeated: Tensor) -> Tensor:
    """Mean attention of each head, in the second half of `repeated_tokens` (B, 2 · half), to the token after the
    earlier occurrence of its own, half - 1 tokens ago: -> (L, H), between 0 and 1. It is the prefix-matching score of
    Olsson et al."""
    half = repeated.shape[1] // 2
    index = torch.arange(half, 2 * half)
    return _attention_to(model, repeated, lambda text: _at(2 * half, index, index - half + 1))


def _follows_an_earlier_occurrence(text: Tensor) -> Tensor:
    """(T,) -> (T, T) bool: whether token s follows an occurrence of token t before t."""
    same = (text[:, None] == text).tril(-1)  # (T, S)
    return F.pad(same, (1, 0))[:, :-1]


def _at(length: int, queries: Tensor, keys: Tensor) -> Tensor:
    """(T, T) bool, true at the pairs of queries and keys."""
    chosen = torch.zeros(length, length, dtype=torch.bool)
    chosen[queries, keys] = True
    return chosen


@torch.no_grad()
def _attention_to(model: TransformerLM, tokens: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over queries of the attention that goes to chosen keys, by layer and head, (L, H); queries without any do
    not count. choose: text (T,) -> (T, T) bool. Texts pass one at a time: all layers' maps are in memory together."""
    total = torch.zeros(len(model.layers), model.config.n_heads)
    queries = 0
    for text in tokens:
        aux = model(text[None], collect=frozenset({ATTENTION_MAP})).aux
        maps = torch.cat([aux[f"layers.{i}.{ATTENTION_MAP}"] for i in range(len(model.layers))])  # (L, H, T, T)
        chosen = choose(text)
        total += (maps * chosen).sum((2, 3))
        queries += int(chosen.any(-1).sum())
    return total / queries


def probe(model: TransformerLM, batches: Batches, text: Tensor) -> Probes:
    """Measure everything: batches of validation windows for the losses, `text` (B, T) for the scores of heads."""
    length = min(model.config.context_length, MAX_LENGTH)
    repeated = repeated_tokens(model.vocab_size, length // 2, TEXTS)
    return Probes(
        losses_by_kind(model, batches),
        copying(model, repeated),
        previous_token_scores(model, text[:TEXTS, :length]),
        matching_scores(model, text[:TEXTS, :length]),
        induction_scores(model, repeated),
    )


class Probed(NamedTuple):
    """A row of the table."""

    name: str
    step: int
    probes: Probes


def probe_run(folder: Path, cache_dir: Path, tokens: int, every_checkpoint: bool = False) -> Iterator[Probed]:
    """Probe a run's newest checkpoint, or each that it has stored, on the first `tokens` of its validation set. Raises
    UserError where the folder is no run, has no whole checkpoint, or its corpus cannot be had."""
    newest = checkpoint.newest(folder, (checkpoint.MODEL,))
    if newest is None:
        check_is_run(folder)
        raise UserError(f"{folder} has no checkpoint yet: nothing to probe")
    corpus = _corpus_of(newest, cache_dir)
    checkpoint.check_tokenizer(folder, corpus.tokenizer, newest.manifest.tokenizer)
    paths = checkpoint_paths(folder) if every_checkpoint else [newest.path]
    for path in paths:
        found = newest if path == newest.path else checkpoint.read(path, (checkpoint.MODEL,))
        config = checkpoint.settings_of(found.path, found.manifest).model
        model = checkpoint.load_model(found, config, corpus.tokenizer.vocab_size)
        batches = evaluation_batches(corpus.val, config.context_length, BATCH, slice(0, tokens))
        if not batches:
            raise UserError(f"--tokens={tokens} is less than a window: {config.context_length} or more")
        yield Probed(folder.resolve().name, found.manifest.step, probe(model, batches, batches[0]().inputs))


def _corpus_of(found: checkpoint.Checkpoint, cache_dir: Path) -> Prepared:
    run = checkpoint.settings_of(found.path, found.manifest)
    return prepare(run.data, run.tokenizer, cache_dir)


COLUMNS = ("run", "step", "loss", "seen", "new", "share", "repeat", "accuracy", "previous", "matching", "induction")


def table(rows: Sequence[Probed]) -> str:
    """Lay out rows as a table of text, a line each below the names of the columns."""
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers in cells:
        padded = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]) + "\n")
    return "".join(lines)


def _cells(row: Probed) -> tuple[str, ...]:
    kinds, copied, *scores = row.probes
    return (
        row.name,
        f"{row.step:,}",
        *(f"{nats:.3f}" for nats in (kinds.loss, kinds.seen, kinds.new)),
        f"{kinds.share:.1%}",
        f"{copied.loss:.2f}",
        f"{copied.accuracy:.1%}",
        *map(_highest, scores),
    )


def _highest(scores: Tensor) -> str:
    """The highest of scores (L, H), and its place."""
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    return f"{scores.max():.2f} ({layer}.{head})"


def main() -> None:
    parser = Parser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--every-checkpoint", action="store_true", help="a row for each checkpoint that is stored")
    parser.add_argument("--tokens", type=number(int, 1), default=65536, help="validation tokens for the losses")
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"), help="folder of prepared corpora")
    with one_line_errors():
        process.end_by_unwinding()
        arguments = parser.parse_args()
        rows = []
        for folder in arguments.runs:
            rows += probe_run(folder, arguments.cache_dir, arguments.tokens, arguments.every_checkpoint)
        show(table(rows))


if __name__ == "__main__":
    main()
