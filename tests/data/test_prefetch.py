"""Prefetching: the same batches as without, a step ahead and no further, and errors at the step that needs the text."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.batches import Batch, TrainingBatches
from data.prefetch import Prefetch
from data.shards.token_files import TokenStream

CPU = torch.device("cpu")
T = 8


def batches() -> TrainingBatches:
    """Steps of twelve windows of forty, so that epochs end within them; 3 begins a document."""
    tokens = np.random.default_rng(0).integers(0, 9, 40 * T + 1, np.uint16)
    return TrainingBatches(TokenStream([tokens]), T, 5, 12, 4, document_start=3)


@dataclass
class Recorded:
    """Stands for TrainingBatches: records which steps are read, and by which thread. A step waits until it may be
    read, and one of them cannot be."""

    at_a_time: int = 4
    damaged: int = -1
    may_read: threading.Event = field(default_factory=threading.Event)
    steps: list[int] = field(default_factory=list)
    threads: set[threading.Thread] = field(default_factory=set)

    def read(self, step: int) -> Batch:
        self.threads.add(threading.current_thread())
        self.steps.append(step)
        assert self.may_read.wait(60)
        if step == self.damaged:
            raise UserError("the shard cannot be read")
        return batches().read(step)


@pytest.mark.parametrize("first", [0, 3])
def test_prefetch_gives_the_batches_of_each_step(first):
    plain = batches()
    with Prefetch(plain, CPU, steps=9) as prefetch:
        for step in range(first, 9):
            expected, found = plain.of_step(step, CPU), prefetch.of_step(step)
            assert len(expected) == len(found) == 3
            for one, other in zip(expected, found, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_prefetch_of_a_step_that_was_not_next_gives_that_step():
    with Prefetch(batches(), CPU, steps=9) as prefetch:
        for step in (4, 2, 8, 2, 3):
            found = torch.cat([batch.inputs for batch in prefetch.of_step(step)])
            assert torch.equal(found, batches().read(step).inputs)


def test_prefetch_reads_one_step_ahead_in_a_thread_and_none_beyond_the_last():
    recorded = Recorded()
    recorded.may_read.set()
    with Prefetch(recorded, CPU, steps=3) as prefetch:
        prefetch.of_step(0)
        recorded.may_read.clear()
        while len(recorded.steps) < 2:  # the next one, unasked, while this one would compute
            threading.Event().wait(0.001)
        assert recorded.steps == [0, 1]
        recorded.may_read.set()
        prefetch.of_step(1)
        prefetch.of_step(2)
    assert recorded.steps == [0, 1, 2]
    (thread,) = recorded.threads
    assert thread is not threading.current_thread() and not thread.is_alive()


def test_prefetch_error_is_raised_by_the_step_that_needs_it():
    recorded = Recorded(damaged=2)
    recorded.may_read.set()
    with Prefetch(recorded, CPU, steps=9) as prefetch:
        assert prefetch.of_step(0) and prefetch.of_step(1)
        with pytest.raises(UserError, match="the shard cannot be read"):
            prefetch.of_step(2)
    assert recorded.steps == [0, 1, 2] and not any(thread.is_alive() for thread in recorded.threads)


def test_prefetch_ends_its_thread_where_the_block_ends_by_an_exception():
    recorded = Recorded()
    recorded.may_read.set()
    with pytest.raises(KeyboardInterrupt), Prefetch(recorded, CPU, steps=9) as prefetch:
        prefetch.of_step(0)
        raise KeyboardInterrupt
    assert not any(thread.is_alive() for thread in recorded.threads)


def test_prefetch_error_that_no_step_needed_is_no_error():
    recorded = Recorded(damaged=1)
    recorded.may_read.set()
    with Prefetch(recorded, CPU, steps=9) as prefetch:
        assert prefetch.of_step(0)
    assert not any(thread.is_alive() for thread in recorded.threads)
