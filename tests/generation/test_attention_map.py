"""Attention maps: what stands where in the picture, and that it is of the text that was given."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.tokenizers.byte import ByteTokenizer
from generation import attention_map
from generation.attention_map import MAX_LABELS, attention_maps, draw_attention
from tests.support import TINY, call, small_model

PNG = b"\x89PNG\r\n"


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved from here on."""
    saved = []
    save = attention_map.save
    monkeypatch.setattr(attention_map, "save", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


def model_of_bytes(*overrides: str, **fields):
    return small_model(*overrides, vocab_size=257, **fields)


def cells(figure) -> np.ndarray:
    return figure.axes[0].images[0].get_array()


def test_draw_attention_shows_layers_as_rows_heads_as_columns_and_tokens_as_labels(tmp_path, figures):
    model = model_of_bytes("attention=mla", n_layers=3)
    text = "a b\n$c$"
    draw_attention(model, ByteTokenizer(), text, tmp_path / "map.png", "a $run$")
    assert (tmp_path / "map.png").read_bytes().startswith(PNG)
    axes, image = figures[0].axes[0], cells(figures[0])
    expected = attention_maps(model, list(text.encode()))
    assert expected.shape == (3, 4, 7, 7)
    pitch = 7 + 1
    assert image.shape == (3 * pitch - 1, 4 * pitch - 1)
    for layer, head in np.ndindex(3, 4):
        found = image[layer * pitch : layer * pitch + 7, head * pitch : head * pitch + 7]
        np.testing.assert_allclose(found.filled(0), expected[layer, head].numpy())
        assert found.mask.tolist() == np.triu(np.ones((7, 7), bool), 1).tolist()  # what no token may see
    tokens = ["a", "·", "b", "\\n", "$", "c", "$"]
    assert [label.get_text() for label in axes.get_yticklabels()] == 3 * tokens
    assert [label.get_text() for label in axes.get_xticklabels()] == 4 * tokens
    assert list(axes.get_yticks()[7:9]) == [pitch, pitch + 1]  # the second layer's first tokens
    assert figures[0].get_suptitle().startswith("a $run$: ")


def test_draw_attention_of_a_long_text_numbers_its_tokens(tmp_path, figures):
    model = model_of_bytes("attention=gqa", n_layers=1)
    for length in (MAX_LABELS, MAX_LABELS + 1):
        draw_attention(model, ByteTokenizer(), "x" * length, tmp_path / "map.svg", "run")
    labels = [[label.get_text() for label in figure.axes[0].get_xticklabels()] for figure in figures]
    assert labels[0] == 4 * MAX_LABELS * ["x"] and labels[1] == 4 * ["0", "10", "20", "30"]


def test_draw_attention_of_a_window_shows_only_its_cells(tmp_path, figures):
    model = model_of_bytes("attention=gqa", "attention.window=3")
    draw_attention(model, ByteTokenizer(), "abcdefgh", tmp_path / "map.pdf", "run")
    seen = ~np.ma.getmaskarray(cells(figures[0])[:8, :8])
    distance = np.subtract.outer(np.arange(8), np.arange(8))
    assert (seen == ((distance >= 0) & (distance < 3))).all()


def test_attention_maps_of_a_longer_text_keep_the_earlier_rows():
    """By the definition: the first token sees itself; an earlier row does not change when more follows."""
    model = model_of_bytes("attention=mla")
    short, long = attention_maps(model, [1, 2, 3]), attention_maps(model, [1, 2, 3, 4])
    torch.testing.assert_close(long[:, :, :3, :3], short)
    assert (long[:, :, 0, 0] == 1).all() and (long[:, :, 0, 1:] == 0).all()


@pytest.mark.filterwarnings("error")
def test_draw_attention_of_characters_without_a_glyph_does_not_warn(tmp_path, figures):
    draw_attention(model_of_bytes("attention=mha"), ByteTokenizer(), "漢🙂", tmp_path / "map.png", "run")
    assert figures[0].axes[0].get_xticklabels()[0].get_text() == "\N{REPLACEMENT CHARACTER}"
    maps = torch.ones(1, 1, 1, 1)
    attention_map._draw(maps, ["漢"], "run", tmp_path / "map.png")


def test_draw_attention_beyond_256_tokens_is_refused(tmp_path):
    model = model_of_bytes("attention=mha", "model.context_length=300", "batch_tokens=300", "eval_tokens=300")
    with pytest.raises(UserError, match="2 to 256 tokens, this one has 257: give a shorter one"):
        draw_attention(model, ByteTokenizer(), "x" * 257, tmp_path / "map.png", "run")


def test_draw_attention_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.figures.write_atomic", full)
    with pytest.raises(UserError, match=r"map.png cannot be written: No space left on device"):
        draw_attention(model_of_bytes("attention=mha"), ByteTokenizer(), "xy", tmp_path / "map.png", "run")


def test_attention_map_from_the_command_line_is_the_same_for_every_kernel_and_execution(
    workplace, monkeypatch, capsys, figures
):
    assert call("train", [*TINY, "attention=mla", "run_dir=runs/one"], monkeypatch) == 0
    capsys.readouterr()
    for more in ([], ["--kernel", "online"], ["--execution", "absorbed", "--run", "runs/one"]):
        assert call("sample", ["The key", "--attention-map", "map.png", *more], monkeypatch) == 0
        assert capsys.readouterr().err == "run runs/one: map.png\n"
    assert (workplace / "map.png").read_bytes().startswith(PNG)
    for figure in figures:
        np.testing.assert_allclose(cells(figure).filled(0), cells(figures[0]).filled(0), atol=1e-5)
    assert figures[0].get_suptitle().startswith("one: ")
