"""Count the rows of tables, and those of them that are no documents."""


class RowCounts:
    """By what a row may lack, such as "no text (column text)": rows that were read, and rows that lack it."""

    def __init__(self):
        self.rows: dict[str, int] = {}
        self.skipped: dict[str, int] = {}

    def add(self, lack: str, is_skipped: bool) -> None:
        self.rows[lack] = self.rows.get(lack, 0) + 1
        self.skipped[lack] = self.skipped.get(lack, 0) + is_skipped

    def lines(self) -> list[str]:
        """What was skipped, in words: one for each lack."""
        skipped = [(lack, count, self.rows[lack]) for lack, count in self.skipped.items() if count]
        return [
            f"{'all' if count == rows else f'{count:,} of'} {rows:,} rows have {lack}" for lack, count, rows in skipped
        ]
