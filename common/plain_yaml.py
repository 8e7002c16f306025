"""YAML as runs write it, read from files that may be anybody's."""

from typing import Any

import yaml
from yaml.composer import Composer

MAX_NUMBER_LENGTH = 100  # characters


class _Plain:
    """Of YAML's nodes, those without aliases, by which a short file can stand for an endless tree, and without numbers
    that take minutes to read."""

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
        """Parses ten times as fast, in C; what it parses is composed as PyYAML does it."""

        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)


def parse(text: str) -> Any:
    """The tree that is written there. Raises yaml.YAMLError, ValueError or RecursionError."""
    if yaml.__with_libyaml__:
        try:
            return yaml.load(text, _FastLoader)
        except yaml.YAMLError as error:
            if "maximum nesting depth" in str(error):
                raise RecursionError from None
            # By PyYAML, then, and in its words: libyaml refuses what it writes of names that are not UTF-8.
    return yaml.load(text, _Loader)
