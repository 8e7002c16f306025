"""Count the rows of tables, and those of them that are no documents."""


class RowCounts:
    """By what a row may lack, such as "no text (column text)": rows that lack it, and rows that were read."""

    def __init__(self):
        self.counts: dict[str, tuple[int, int]] = {}
        self.place = ""

    def of(self, name: str) -> "RowCounts":
        """These counts, to which the part of a mix adds its own under its name."""
        part = RowCounts()
        part.counts = self.counts
        part.place = f"{self.place} in {name}"
        return part

    def add(self, lack: str, is_skipped: bool) -> None:
        lack += self.place
        skipped, rows = self.counts.get(lack, (0, 0))
        self.counts[lack] = skipped + is_skipped, rows + 1

    def lines(self) -> list[str]:
        """What was skipped, in words: one for each lack."""
        return [
            f"{_share(skipped, rows)} {'has' if skipped == 1 else 'have'} {lack}"
            for lack, (skipped, rows) in self.counts.items()
            if skipped
        ]


def _share(count: int, rows: int) -> str:
    if count < rows:
        return f"{count:,} of {rows:,} rows"
    return "1 row" if rows == 1 else f"all {rows:,} rows"
