"""YAML without aliases (one line could expand to gigabytes), duplicate keys and tags."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from classification.errors import UserError

# Kinds that are read; what looks like a date stays text.
PLAIN = [f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")]
LARGEST = 2**63


class _Loader(yaml.SafeLoader):
    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (None, *PLAIN)}  # noqa: RUF012

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = yaml.SafeLoader.peek_event(self).start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not allowed: write out the value", problem_mark=mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} occurs twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, ScalarNode) else None)
        return node


def _integer(loader: _Loader, node: ScalarNode) -> int:
    # Python refuses to read, or to write, numbers of thousands of digits.
    if len(node.value) > 100 or abs(number := loader.construct_yaml_int(node)) >= LARGEST:
        raise yaml.MarkedYAMLError(problem="a whole number is too large", problem_mark=node.start_mark)
    return int(number)


def _text(loader: _Loader, node: ScalarNode) -> str:
    return loader.construct_yaml_str(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _text)


def read_yaml(text: str) -> Any:
    """Read null, true, numbers, texts, lists and mappings.

    Raises:
        UserError: saying what is wrong and where.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UserError(f"{error.problem or error.context}{where}") from error
    except RecursionError as error:
        raise UserError("it is nested too deeply") from error
    except Exception as error:  # a tag before what it does not fit raises whatever comes
        raise UserError(f"a value cannot be read ({' '.join(str(error).split())})") from error
