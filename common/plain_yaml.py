"""YAML as runs write it, read from files that may be anybody's."""

from typing import Any

import yaml
from yaml.composer import Composer

MAX_NUMBER_LENGTH = 100  # characters


class _Plain:
    """Refuse aliases, by which a short file can stand for an endless tree, numbers that take minutes to read, and what
    is set twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise _fault("an alias", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        text = not isinstance(node, yaml.ScalarNode) or node.tag == self.DEFAULT_SCALAR_TAG
        if not text and len(node.value) > MAX_NUMBER_LENGTH:
            raise _fault(f"{node.value[:20]}..., which is too long for a number", node.start_mark)
        if not text and ":" in node.value and node.tag.endswith((":int", ":float")):
            raise _fault(f"{node.value}, which YAML reads as a number in base 60", node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (LookupError, AttributeError, ValueError):
            raise _fault("a value that does not fit its tag", node.start_mark) from None

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.tag.endswith(":merge"):
                    raise _fault("<<, which would set what is set elsewhere", key.start_mark)
                if key.value in seen:
                    raise _fault(f"{key.value[:50]} for the second time", key.start_mark)
                seen.add(key.value)
        return node


def _fault(what: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"it holds {what}", problem_mark=mark)


class _Loader(_Plain, yaml.SafeLoader):
    pass


if yaml.__with_libyaml__:

    class _FastLoader(_Plain, Composer, yaml.CSafeLoader):
        """Parses ten times as fast, in C, and composes what it parsed as PyYAML does."""

        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)


def parse(text: str) -> Any:
    """Parse a YAML document -> plain values. Raises yaml.YAMLError, in one line, or RecursionError."""
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
    except yaml.MarkedYAMLError as error:
        message = ": ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        raise yaml.YAMLError(f"{message}, in line {mark.line + 1}" if mark else message) from None
    except yaml.YAMLError as error:
        raise yaml.YAMLError(str(error).splitlines()[0]) from None
    except (ValueError, OverflowError):  # of an escape, or of the version of YAML
        raise yaml.YAMLError("it holds an escape or a version that is too large") from None
