"""YAML as people write settings: what a plain reader would pass over, or stumble on, is a ValueError in one line."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class _Strict(yaml.SafeLoader):
    """Of two equal keys the plain reader keeps the last one and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise ValueError(f"the key {key.value} is there twice, again on line {key.start_mark.line + 1}")
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(text: str) -> Any:
    """The value of a YAML text. Raises ValueError, in one line, for what is no YAML, and for a key that is there twice."""
    try:
        return yaml.load(text, _Strict)
    except (yaml.YAMLError, TypeError) as error:  # a TypeError: a key that cannot be one
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
