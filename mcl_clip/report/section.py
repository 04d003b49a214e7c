"""What a section of the report is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: a title, and what its template `templates/NAME.html.jinja` shows."""

    name: str
    title: str
    content: Mapping[str, Any] = field(default_factory=dict)
