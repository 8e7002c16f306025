"""Batches: the tokens a step trains on, as a function of seed and step, so that resuming needs no saved position.

Window i of a stream predicts tokens i·T+1 ... i·T+T from tokens i·T ... i·T+T-1; the tail that fills no window is
dropped. Which window a sequence of the training is, data/order.py says.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from common.errors import UserError
from common.settings import MAX_COUNT
from data.order import windows_of
from data.shards.build import too_short
from data.shards.prepare import Prepared
from data.shards.token_files import TokenStream

SAMPLED_TOKENS = 2**18


class Ahead(NamedTuple):
    """What multi-token prediction reads beside each input and what it predicts, (B, T) int64 each. -1 is none."""

    tokens: Tensor  # the token after each input, in the same document and window
    targets: Tensor  # the token after that one

    @property
    def counted(self) -> Tensor:
        """The number of targets that count, a scalar on the device."""
        return (self.targets >= 0).sum()


class Batch(NamedTuple):
    """Windows of a stream, (B, T) int64 each. Of packed documents it also knows which token belongs to which."""

    inputs: Tensor
    targets: Tensor  # the token after each input; -1 is not counted
    positions: Tensor | None = None  # of each input in its document, or in the window if that cuts it
    docs: Tensor | None = None  # number of each input's document in the window

    @classmethod
    def of(
        cls, inputs: Tensor, targets: Tensor, document_start: int | None = None, counted: Tensor | None = None
    ) -> Self:
        """document_start: the token that begins a document, where documents do not see each other; None: each window is
        one text. counted: (T,) or (B, T) bool, which targets of a window count; None: all."""
        if counted is not None:
            targets = targets.masked_fill(~counted, -1)
        if document_start is None:
            return cls(inputs, targets)
        return cls(inputs, targets, *document_positions(inputs, document_start))

    @property
    def counted(self) -> Tensor:
        """The number of targets that count, a scalar on the device."""
        return (self.targets >= 0).sum()

    def ahead(self) -> Ahead:
        """Of each input, the target of the input after it, if that is of the same document: so the last input of a
        window or a document has none, and what ends a document, which begins the next, is predicted from within."""
        none = torch.full_like(self.inputs[:, :1], -1)
        moved = (of[:, 1:] for of in (self.inputs, self.targets))  # (B, T - 1)
        if self.docs is not None:
            goes_on = self.docs[:, 1:] == self.docs[:, :-1]
            moved = (of.where(goes_on, -1) for of in moved)
        return Ahead(*(torch.cat((of, none), 1) for of in moved))

    def to(self, device: torch.device) -> Self:
        """The batch on a device."""
        parts = [part for part in self if part is not None]
        if device.type == "cuda":
            # or the copy would wait for all work queued on the GPU
            parts = [part.pin_memory() if part.device.type == "cpu" else part for part in parts]
        return type(self)(*(part.to(device, non_blocking=True) for part in parts))

    def split(self, size: int) -> list[Self]:
        """Batches of `size` windows each, and of fewer at the end."""
        parts = (part.split(size) for part in self if part is not None)
        return [type(self)(*pieces) for pieces in zip(*parts, strict=True)]


@dataclass(frozen=True)
class TrainingBatches:
    """What the steps of a run train on: step s takes sequences s·G ... s·G + G - 1, a micro-batch at a time."""

    stream: TokenStream
    length: int  # tokens in a sequence
    seed: int
    sequences: int  # G, in a step
    micro_batch: int  # sequences at a time, at most
    document_start: int | None = None  # as Batch.of takes it
    counted_targets: Tensor | None = None  # likewise
    rank: int = 0  # of `ranks` processes, each of which takes an equal share of a step
    ranks: int = 1

    def of_step(self, step: int, device: torch.device) -> list[Batch]:
        """Read the micro-batches of a step, of this process's share, on a device."""
        return self.read(step).to(device).split(self.at_a_time)

    def read(self, step: int) -> Batch:
        """Read all that this process trains on in a step, on the CPU."""
        n = count_windows(self.stream, self.length)
        chosen = windows_of(n, self.seed, step * self.sequences + self.rank * self.share, self.share)
        return read_windows(self.stream, self.length, chosen, self.document_start, self.counted_targets)

    @property
    def share(self) -> int:
        """The sequences of a step that this process trains on."""
        return self.sequences // self.ranks

    @property
    def at_a_time(self) -> int:
        """The sequences of a micro-batch."""
        return micro_batch_of(self.share, self.micro_batch)


def micro_batch_of(share: int, most: int) -> int:
    """The sequences that a process takes at a time of its share of a step: the most that divide it, up to `most`."""
    return max(n for n in range(1, min(most, share) + 1) if share % n == 0)


def count_windows(stream: TokenStream, length: int) -> int:
    """The number of windows of `length` tokens in the stream."""
    return max(0, (len(stream) - 1) // length)


def evaluation_batches(
    stream: TokenStream,
    length: int,
    batch_size: int,
    tokens: slice = slice(None),
    document_start: int | None = None,
    counted: Tensor | None = None,
) -> list[Callable[[], Batch]]:
    """Batches of the windows of the stream, or of those within a slice of its tokens, in order and without overlap.
    Each is a function that reads at most batch_size windows. document_start, counted: as Batch.of takes them."""
    start, stop, _ = tokens.indices(count_windows(stream, length) * length)
    chosen = list(range(start // length, stop // length))
    groups = [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]
    return [functools.partial(read_windows, stream, length, group, document_start, counted) for group in groups]


def documents_of_step(corpus: Prepared, length: int, seed: int, step: int, sequences: int) -> list[str]:
    """Names of the documents that a step trains on."""
    chosen = windows_of(count_windows(corpus.train, length), seed, step * sequences, sequences)
    return corpus.training_documents((i * length, (i + 1) * length + 1) for i in chosen)


def document_positions(tokens: Tensor, document_start: int) -> tuple[Tensor, Tensor]:
    """Positions and document ids of packed documents, each of which begins with document_start: windows (B, T) -> for
    each token, its position from the start of its document, or of the window if that cuts it, and the number of its
    document in the window."""
    begins = tokens == document_start  # (B, T)
    index = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
    start = torch.where(begins, index, 0).cummax(dim=1).values  # (B, T)
    return index - start, begins.cumsum(dim=1)


def sampled_positions(stream: TokenStream, length: int, document_start: int) -> tuple[Tensor, Tensor]:
    """`document_positions` of windows spread evenly over the stream: all, or enough for SAMPLED_TOKENS."""
    count = count_windows(stream, length)
    every = -(-count * length // SAMPLED_TOKENS)
    return document_positions(
        read_windows(stream, length, list(range(every // 2, count, every))).inputs, document_start
    )


def check_split_lengths(corpus: Prepared, length: int, eval_tokens: int = MAX_COUNT) -> None:
    """Raises UserError where a split is shorter than one window, and where no token of it is counted; of the validation
    split none of the first eval_tokens."""
    for split, stream, tokens in (("train", corpus.train, MAX_COUNT), ("val", corpus.val, eval_tokens)):
        windows = count_windows(stream, length)
        if not windows:
            raise too_short(split, f"{len(stream):,} tokens", length + 1)
        if not _counts_any(stream, min(windows, tokens // length) * length):
            which = "of the training split" if split == "train" else "of the first eval_tokens of the validation split"
            way_out = "give more text" if split == "train" else "give a larger eval_tokens, or more text"
            raise UserError(f"every token {which} is of a prompt (data.prompt), so that none is counted: {way_out}")


def _counts_any(stream: TokenStream, tokens: int) -> bool:
    """Whether any of the first targets of the stream is counted."""
    marks = stream.counted
    if marks is None:
        return True
    return any(marks.read(i + 1, min(SAMPLED_TOKENS, tokens - i)).any() for i in range(0, tokens, SAMPLED_TOKENS))


def read_windows(
    stream: TokenStream,
    length: int,
    indices: list[int],
    document_start: int | None = None,
    counted: Tensor | None = None,
) -> Batch:
    """Read windows by index, on the CPU: (length + 1,) tokens each, of which the inputs are all but the last and the
    targets all but the first; those of prompts do not count. document_start, counted: as Batch.of takes them."""
    tokens = _windows(stream, length, indices)
    if stream.counted is not None:
        counted = _windows(stream.counted, length, indices)[:, 1:].bool()
    return Batch.of(tokens[:, :-1], tokens[:, 1:], document_start, counted)


def _windows(stream: TokenStream, length: int, indices: list[int]) -> Tensor:
    """(B, length + 1) int64."""
    tokens = torch.empty((len(indices), length + 1), dtype=torch.int64)
    for row, window in zip(tokens.numpy(), stream.read_each((i * length for i in indices), length + 1), strict=True):
        row[:] = window
    return tokens
