"""An end that is asked for: by Ctrl-C or by SIGTERM, as schedulers and `kill` send it."""

import os
import signal
import threading
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within its `with` block, the first signal is written down, for the training loop to act on after the step; the
    second one is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        else:
            self.before = {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """As shells count them: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signal

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{self.signal.name}: finishing the step and saving; once more ends at once\n".encode())
