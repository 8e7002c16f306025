"""What is shown to the user as one line, without a traceback."""


class UserError(Exception):
    """A mistake of the user's or a fault of a file: the message names the value, the limit and the way out. It is one
    line, also where the value it quotes is several."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))
