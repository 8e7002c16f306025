"""What is shown to the user as one line, without a traceback."""


class UserError(Exception):
    """A mistake of the user's or a fault of a file: the message names the value, the limit and the way out."""
