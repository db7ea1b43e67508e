"""YAML that says what stands there: a key twice is a mistake, and so is an alias (*name).

A few lines of aliases can stand for gigabytes, or for a value that holds itself.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

_MOST_DIGITS = 100
_MOST_LEVELS = 20  # of lists and groups in brackets


def read_yaml(text: str) -> Any:
    """The value of a YAML document. Raises yaml.YAMLError, or ValueError for a number or a date that is none."""
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


class _StrictLoader(yaml.SafeLoader):
    def fetch_flow_collection_start(self, kind: type[yaml.Token]) -> None:
        if self.flow_level > _MOST_LEVELS:  # the library's time grows as the square of them
            raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(kind)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            problem = f"*{event.anchor} is an alias, which is not followed: write the value itself there"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MOST_DIGITS:  # in base 60 (4:00:00) the library's time grows as the square of them
            raise yaml.constructor.ConstructorError(None, None, "a number of so many digits", node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the parent class says so, with the line
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
