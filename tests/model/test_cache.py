"""KV caches hold each position's values, whatever order, chunks and rewinding they are written in."""

import pytest
import torch
from torch import Tensor

from model.cache import SLACK, CacheView, FullCache, WindowCache
from model.placement import Placement


def at(positions: list[list[int]] | Tensor, kv_len: int | None = None) -> Placement:
    return Placement.decode(torch.as_tensor(positions), caches=(), kv_len=kv_len)


def test_full_cache_stores_positions_in_rows_and_padding_in_the_spare_row():
    cache = FullCache(2, 4, {"k": (1,)}, like=torch.zeros(()))
    cache.update(at([[2, -1], [0, 3]]), k=torch.tensor([[[5.0], [6.0]], [[7.0], [8.0]]]))
    nothing = torch.zeros(2, 1, 1)
    (k,), positions = cache.update(at([[-1], [-1]]), k=nothing)
    assert k[:, :, 0].tolist() == [[0, 0, 5, 0], [7, 0, 0, 8]]
    assert positions.tolist() == [[0, 1, 2, 3]]
    assert cache.update(at([[-1], [-1]], kv_len=3), k=nothing).columns[0].shape == (2, 3, 1)
    cache.grow(6)
    assert cache.update(at([[-1], [-1]]), k=nothing).columns[0][:, :, 0].tolist() == [
        [0, 0, 5, 0, 0, 0],
        [7, 0, 0, 8, 0, 0],
    ]
    assert cache.capacity == 6
    with pytest.raises(IndexError):
        cache.update(at([[6], [6]]), k=nothing)


def check_holds(view: CacheView, row: int, last: int, num_global: int, window: int) -> None:
    """The row's view has the value of each position that a query at `last` may see, and no other under its name."""
    seen = [(int(p), float(k)) for p, k in zip(view.positions[row], view.columns[0][row], strict=True) if p >= 0]
    visible = {p: value for p, value in seen if p <= last and (p < num_global or p > last - window)}
    assert visible == {p: p for p in range(last + 1) if p < num_global or p > last - window}
    assert len(seen) == len(dict(seen)), "a position is there twice"


@pytest.mark.parametrize("num_global", [0, 2])
def test_window_cache_holds_the_latest_positions_and_the_first_ones(num_global):
    """Written in chunks of any length, rows at different positions."""
    window, firsts = 4, torch.tensor([[0], [-3]])  # the second row begins with three tokens of padding
    cache = WindowCache(2, 3, {"k": ()}, like=torch.zeros(()), window=window, num_global=num_global)
    start = 0
    for size in (1, 2, 3, 1, 1, 9, 1, 40, 1, 25, 1):
        positions = (firsts + torch.arange(start, start + size)).clamp(min=-1)
        if cache.capacity < start + size:
            cache.grow(start + size)
        view = cache.update(at(positions), k=positions.float())
        start += size
        for row, last in enumerate(positions[:, -1].tolist()):
            check_holds(view, row, last, num_global, window)
    assert cache.rows == window + num_global + SLACK
    assert cache.bytes_per_sequence == 4 * cache.rows


@pytest.mark.parametrize("taken_back", [1, 5, SLACK])
@pytest.mark.parametrize("num_global", [0, 2])
def test_window_cache_rewinds_each_row_by_itself(num_global, taken_back):
    window = 4
    cache = WindowCache(2, 99, {"k": ()}, like=torch.zeros(()), window=window, num_global=num_global)
    for length in (1, 3, 20, 21, 30, 70):
        true = torch.arange(length).expand(2, -1)
        cache.update(at(true), k=true.float())
        ahead = torch.arange(length, length + taken_back)[None]
        for part in ahead.split(1, dim=1):  # the second row is rewound by less
            cache.update(at(part.expand(2, -1)), k=torch.tensor([[-5.0], [float(part)]]))
        fewer = taken_back // 2
        lengths = torch.tensor([length, length + taken_back - fewer])
        cache.rewind(lengths)
        for row, kept in enumerate(lengths.tolist()):
            check_holds(cache.read(lengths), row, kept - 1, num_global, window)
        view = cache.update(at(lengths[:, None]), k=lengths[:, None].float())
        for row, last in enumerate(lengths.tolist()):
            check_holds(view, row, last, num_global, window)


@pytest.mark.parametrize("kind", [FullCache, WindowCache])
def test_cache_copied_row_is_read_like_its_source(kind):
    cache = kind(3, 8, {"k": (), "v": (2,)}, like=torch.zeros(()), **({"window": 3} if kind is WindowCache else {}))
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, -1, -1], [0, -1, -1, -1]])
    cache.update(at(positions), k=positions + torch.tensor([[0.0], [10.0], [20.0]]), v=torch.rand(3, 4, 2))
    cache.copy_row(0, 2)
    view = cache.read(torch.tensor([4, 2, 4]))
    assert view.positions[2].tolist() == view.positions[0].tolist()
    assert sorted(p for p in view.positions[2].tolist() if p >= 0) == [0, 1, 2, 3]
    assert sorted(p for p in view.positions[1].tolist() if p >= 0) == [0, 1]
    assert all(torch.equal(column[2], column[0]) for column in view.columns)
    k = view.columns[0][2][view.positions[2] >= 0]
    assert k.sort().values.tolist() == [0, 1, 2, 3]
