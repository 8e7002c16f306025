"""YAML as runs write it, read from files that may be anybody's."""

from typing import Any

import yaml
from yaml.composer import Composer

MAX_NUMBER_LENGTH = 100  # characters


class _Plain:
    """Refuse aliases, by which a short file can stand for an endless tree, and numbers that take minutes to read."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias")
        node = super().compose_node(parent, index)
        text = not isinstance(node, yaml.ScalarNode) or node.tag == self.DEFAULT_SCALAR_TAG
        if not text and len(node.value) > MAX_NUMBER_LENGTH:
            raise yaml.YAMLError(f"it holds {node.value[:20]}..., which is no number")
        return node


class _Loader(_Plain, yaml.SafeLoader):
    pass


if yaml.__with_libyaml__:

    class _FastLoader(_Plain, Composer, yaml.CSafeLoader):
        """Parses ten times as fast, in C, and composes what it parsed as PyYAML does."""

        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)


def parse(text: str) -> Any:
    """Parse a YAML document -> plain values. Raises yaml.YAMLError, ValueError or RecursionError."""
    try:
        if yaml.__with_libyaml__:
            try:
                return yaml.load(text, _FastLoader)
            except yaml.MarkedYAMLError as error:
                if error.problem == "exceeded maximum nesting depth":
                    raise RecursionError from None
            # PyYAML reads it again, and refuses it in its own words, or accepts it: the escapes that it writes for
            # names of files that are not UTF-8 are refused by libyaml.
        return yaml.load(text, _Loader)
    except (LookupError, AttributeError):
        raise yaml.YAMLError("it holds a value that does not fit its tag") from None
