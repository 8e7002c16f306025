"""Draws the map of the code: the rooms, which may import which, and a token's way through the files.

python -m docs.rooms > docs/rooms.svg

Which room may import which is read from tests/test_floors.py, what a room is from its docstring.
"""

import ast
import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from common.invocation import ROOT
from tests.test_floors import DOORS, ROOMS

WIDTH = 900
MARGIN = 20
GAP = 20
ROOM_HEIGHT = 60
ROOM_TOP = 66
STEP_WIDTH = 156
STEP_HEIGHT = 46
COLUMN = (WIDTH - 2 * MARGIN - 12 - STEP_WIDTH) / 4  # from the left edge of a step to that of the next one
ROW = 84  # from the upper edge of a step to that of the one below


class Step(NamedTuple):
    name: str
    file: str
    column: int
    row: int


STEPS = (
    Step("text", "data/sources/corpus.py", 0, 0),
    Step("tokenizer", "data/tokenizers/base.py", 1, 0),
    Step("shards", "data/shards/build.py", 2, 0),
    Step("batch", "data/batches.py", 3, 0),
    Step("embedding", "model/transformer.py", 0, 1),
    Step("norm", "model/norm.py", 1, 1),
    Step("attention", "model/attention/base.py", 2, 1),
    Step("MLP", "model/mlp.py", 3, 1),
    Step("logits", "model/transformer.py", 4, 1),
    Step("KV cache", "model/cache.py", 2, 2),
    Step("loss", "model/loss.py", 4, 2),
    Step("training step", "training/step.py", 3, 2),
    Step("sampler", "generation/sampler.py", 4, 3),
    Step("decode loop", "generation/decode.py", 3, 3),
    Step("text", "generation/text_stream.py", 2, 3),
)
ROWS_OF_ARROWS = ((0, (0, 1, 2, 3)), (1, (0, 1, 2, 3, 4)), (2, (4, 3)), (3, (4, 3, 2)))  # (row, columns in turn)
STYLE = """
.rooms { background: #fff; font-family: system-ui, sans-serif; }
.rooms .page { fill: #fff; }
.rooms text { fill: #1f2328; font-size: 11.5px; }
.rooms .title { font-size: 17px; font-weight: 600; }
.rooms .name { font-size: 14px; font-weight: 600; }
.rooms .file { font-family: ui-monospace, monospace; font-size: 10px; }
.rooms .note { fill: #59636e; }
.rooms rect.box { stroke: #59636e; stroke-width: 1; }
.rooms .arrow { fill: none; stroke: #59636e; stroke-width: 1.4; marker-end: url(#rooms-head); }
.rooms .head { fill: #59636e; }
.rooms .block { fill: none; stroke: #59636e; stroke-dasharray: 5 4; }
.rooms a:hover rect { stroke-width: 2.5; }
.rooms .scripts { fill: #fff; } .rooms .common, .rooms .runtime { fill: #eceff2; } .rooms .ablation { fill: #f6e3ee; }
.rooms .data { fill: #dcebf7; } .rooms .model { fill: #fdeacb; }
.rooms .training { fill: #d9f0e4; } .rooms .generation { fill: #fbdfd2; }
@media (prefers-color-scheme: dark) {
.rooms { background: #0d1117; }
.rooms .page, .rooms .scripts { fill: #0d1117; }
.rooms text { fill: #e6edf3; }
.rooms .note { fill: #b3bcc6; }
.rooms rect.box, .rooms .arrow, .rooms .block { stroke: #b3bcc6; }
.rooms .head { fill: #b3bcc6; }
.rooms .common, .rooms .runtime { fill: #2a3038; } .rooms .ablation { fill: #4a2a3d; }
.rooms .data { fill: #17375a; } .rooms .model { fill: #533a10; }
.rooms .training { fill: #12452f; } .rooms .generation { fill: #5a2c1a; }
}
"""
PAGE = """<svg xmlns="http://www.w3.org/2000/svg" class="rooms" viewBox="0 0 {width} {height}" width="100%">
<title>The map of the code</title>
<style>{style}</style>
<defs><marker id="rooms-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path class="head" d="M0,0L8,4L0,8Z"/></marker></defs>
<rect class="page" width="{width}" height="{height}"/>
{content}
</svg>"""
TEXT = '<text class="{style}" x="{x:g}" y="{y:g}">{text}</text>'
CENTERED = '<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="middle">{text}</text>'
BOX = '<rect class="box {room}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
BLOCK = '<rect class="block" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="10"/>'
ARROW = '<path class="arrow" d="{path}"/>'
LINK = '<a href="../{file}">{content}</a>'


def floors() -> list[list[str]]:
    """The rooms, those that use the most first; rooms of one floor do not know each other."""
    below: list[str] = []
    found: list[list[str]] = []
    while len(below) < len(ROOMS):
        floor = [room for room, used in ROOMS.items() if room not in below and used <= set(below)]
        assert floor and all(ROOMS[room] == set(below) for room in floor), f"not all of {floor} may use all of {below}"
        found.append(floor)
        below += floor
    return found[::-1]


def what_is(room: str) -> str:
    """The first sentence of a room's docstring."""
    return ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())).partition(". ")[0].rstrip(".")


def box(room: str, place: tuple[float, float], size: tuple[float, float], lines: Sequence[tuple[str, str]]) -> str:
    """A box in the color of a room. place: its upper left corner. lines: (class of text, text), centered."""
    (x, y), (width, height) = place, size
    first = y + height / 2 + 4 - 8 * (len(lines) - 1)
    texts = [
        CENTERED.format(style=style, x=x + width / 2, y=first + 16 * i, text=escape(text))
        for i, (style, text) in enumerate(lines)
    ]
    return "\n".join([BOX.format(room=room, x=x, y=y, width=width, height=height), *texts])


def draw_rooms() -> Iterator[str]:
    yield TEXT.format(style="title", x=MARGIN, y=32, text="The rooms")
    yield TEXT.format(
        style="note", x=MARGIN, y=52, text="A room may import every room below it, and none beside or above it."
    )
    for row, names in enumerate([list(DOORS), *floors()]):
        width = (WIDTH - 2 * MARGIN - GAP * (len(names) - 1)) / len(names)
        for i, name in enumerate(names):
            place = MARGIN + i * (width + GAP), ROOM_TOP + row * (ROOM_HEIGHT + GAP / 2)
            if name in DOORS:
                file = f"{name}.py"
                yield LINK.format(file=file, content=box("scripts", place, (width, ROOM_HEIGHT), [("name", file)]))
            else:
                about = [("note", line) for line in textwrap.wrap(what_is(name), width / 6)]
                yield box(name, place, (width, ROOM_HEIGHT), [("name", f"{name}/"), *about])


def draw_steps(top: float) -> Iterator[str]:
    """top: of the first row of boxes."""
    yield TEXT.format(style="title", x=MARGIN, y=top - 46, text="A token's way")
    yield TEXT.format(
        style="note", x=MARGIN, y=top - 26, text="Each box names the file that does the step, and links to it."
    )
    yield BLOCK.format(x=_left(1) - 12, y=top + ROW - 24, width=2 * COLUMN + STEP_WIDTH + 24, height=STEP_HEIGHT + 36)
    block = "a block, n_layers of them: x + attention(norm(x)), then x + mlp(norm(x))"
    yield TEXT.format(style="note", x=_left(1), y=top + ROW - 9, text=block)
    for step in STEPS:
        lines = [("name", step.name), ("file", step.file)]
        place = _left(step.column), top + step.row * ROW
        content = box(step.file.partition("/")[0], place, (STEP_WIDTH, STEP_HEIGHT), lines)
        yield LINK.format(file=step.file, content=content)
    yield from (ARROW.format(path=path) for path in paths(top))
    yield TEXT.format(style="note", x=_middle(0) + 8, y=top + 3 * ROW + 18, text="the next token")


def paths(top: float) -> Iterator[str]:
    """Arrows from step to step."""
    for row, columns in ROWS_OF_ARROWS:
        for one, other in pairwise(columns):
            ends = (STEP_WIDTH, 0) if one < other else (0, STEP_WIDTH)
            y = top + row * ROW + STEP_HEIGHT / 2
            yield f"M{_left(one) + ends[0]:g},{y:g}H{_left(other) + ends[1]:g}"
    under = [top + row * ROW + STEP_HEIGHT for row in range(4)]
    yield f"M{_middle(3):g},{under[0]:g}v8H{_middle(0):g}V{top + ROW:g}"  # batch -> embedding
    for column in (2, 4):  # attention -> KV cache, logits -> loss
        yield f"M{_middle(column):g},{under[1]:g}V{top + 2 * ROW:g}"
    yield f"M{_middle(2) - 24:g},{top + 2 * ROW:g}V{under[1]:g}"  # KV cache -> attention
    right = _left(4) + STEP_WIDTH
    yield f"M{right:g},{under[1] - STEP_HEIGHT / 2:g}h12V{under[3] - STEP_HEIGHT / 2:g}h-12"  # logits -> sampler
    yield f"M{_middle(3):g},{under[3]:g}v14H{_middle(0):g}V{under[1]:g}"  # decode loop -> embedding


def _left(column: int) -> float:
    return MARGIN + column * COLUMN


def _middle(column: int) -> float:
    return _left(column) + STEP_WIDTH / 2


def drawn() -> str:
    """The whole file."""
    steps_top = ROOM_TOP + (len(floors()) + 1) * (ROOM_HEIGHT + GAP / 2) + 76
    height = steps_top + 3 * ROW + STEP_HEIGHT + 30
    content = "\n".join([*draw_rooms(), *draw_steps(steps_top)])
    return PAGE.format(width=WIDTH, height=f"{height:g}", style=STYLE, content=content)


def main() -> None:
    print(drawn())


if __name__ == "__main__":
    main()
