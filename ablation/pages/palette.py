"""Colors, dashes and markers that tell variants apart: with deficient color vision, in gray, and where there are more
variants than colors."""

from typing import NamedTuple


class Look(NamedTuple):
    light: str  # color on a light page
    dark: str  # color on a dark page
    dash: tuple[int, ...]  # lengths of strokes and gaps; () is a line without gaps
    marker: int  # index into SHAPES and MATPLOTLIB_MARKERS


COLORS = (  # (on light, on dark): the baseline first, in the color of the text
    ("#33373d", "#e4e4e0"),
    ("#0072b2", "#56b4f0"),
    ("#d55e00", "#ff8a4a"),
    ("#00875f", "#2fc99a"),
    ("#680c6e", "#b06fb6"),
    ("#7a0010", "#d04356"),
    ("#b67799", "#f7b6ea"),
    ("#8d924f", "#76911a"),
    ("#854e0f", "#b6b277"),
    ("#9c115b", "#be557f"),
    ("#003b94", "#9494ff"),
    ("#8d81df", "#9688bf"),
    ("#605734", "#b58145"),
)
DASHES: tuple[tuple[int, ...], ...] = ((), (7, 3), (2, 3), (8, 3, 2, 3), (12, 4))
SAME_DASH = 4  # variants in a row, whose colors differ most
# Each about 8 units wide, around the origin: circle, square, triangle, diamond, cross, triangle downwards, plus.
SHAPES = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "M-3.5,-3.5H3.5V3.5H-3.5Z",
    "M0,-4.6L4.4,3.4H-4.4Z",
    "M0,-5L4.2,0L0,5L-4.2,0Z",
    "M-4,-2.4L-2.4,-4L0,-1.6L2.4,-4L4,-2.4L1.6,0L4,2.4L2.4,4L0,1.6L-2.4,4L-4,2.4L-1.6,0Z",
    "M0,4.6L4.4,-3.4H-4.4Z",
    "M-1.2,-4.4H1.2V-1.2H4.4V1.2H1.2V4.4H-1.2V1.2H-4.4V-1.2H-1.2Z",
)
MATPLOTLIB_MARKERS = "os^DXvP"


def look(index: int) -> Look:
    """The look of a chart's n-th variant. Colors come again after thirteen, with other dashes and markers."""
    light, dark = COLORS[index % len(COLORS)]
    return Look(light, dark, DASHES[index // SAME_DASH % len(DASHES)], index % len(SHAPES))
