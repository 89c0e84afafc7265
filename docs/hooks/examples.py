"""Shows an ``Example:`` in a docstring as the code that it is; griffe knows the plural only."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Turns the heading into ``Examples:``."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
