"""YAML whose scalars stay the text that was written.

A hash seed is text to the engine: YAML would read `042` as 34 and `1_000` as 1000, and every block key would silently
be wrong. So only `null` has a type here; numbers and truth values are for the settings model to read, which knows what
it wants.
"""

from __future__ import annotations

import yaml

_KEPT = frozenset({"tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"})


class _TextLoader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own class attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load_plain_yaml(text: str) -> object:
    """Mappings, lists, `str` and None. JSON is YAML too. Raises `ValueError` that says where the text goes wrong."""
    try:
        return yaml.load(text, _TextLoader)  # a SafeLoader: it builds plain values only
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None
