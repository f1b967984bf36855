"""YAML whose mappings have every key once."""

from pathlib import Path
from typing import Any

import yaml

from .text import read_text


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        OSError: there is no such file.
        ValueError: it is not YAML, or a key is twice in a mapping, of which YAML would take the last; with its line.
    """
    loader = yaml.SafeLoader(read_text(path))
    try:
        node = loader.get_single_node()
        _check_keys(path, node)
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def _check_keys(path: Path, root: yaml.Node | None) -> None:
    nodes, seen = [root], set()  # an alias is the node that it stands for
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
            _check_mapping(path, [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)])


def _check_mapping(path: Path, keys: list[yaml.ScalarNode]) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key in keys:
        line, name = key.start_mark.line + 1, (key.tag, key.value)
        if name in lines:
            raise ValueError(f"{path}, line {line}: {key.value!r} is there twice, first in line {lines[name]}")
        lines[name] = line
