"""Makes docstrings' sections those that the site's reader of docstrings knows."""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Reads "Example:", as pytest's doctests and this project have it, as "Examples:"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section in the docstring of an object."""
        if obj.docstring is not None:
            value = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", value, flags=re.MULTILINE)
