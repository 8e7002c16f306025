"""What is shown to the user as one line, without a traceback."""

LONGEST = 4000  # characters; what a file holds may be quoted, and be of any length


class UserError(Exception):
    """A mistake of the user's or a fault of a file: the message names the value, the limit and the way out. It is one
    line, also where the value it quotes is several."""

    def __init__(self, message: str):
        line = " ".join(message.splitlines())
        if len(line) > LONGEST:  # how it begins, and the way out
            line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
        super().__init__(line)
