"""What the model says when it cannot do what was asked of it."""


class Unsupported(ValueError):
    """A choice that this device, dtype or shape does not have; the message says what to choose instead."""


class NotFinite(ArithmeticError):
    """A model's output holds NaN, or rules out every token, so nothing follows from it; the message says where."""
