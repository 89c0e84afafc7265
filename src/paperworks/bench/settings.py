"""Settings of a claim: pydantic models whose defaults may depend on the scale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from paperworks.catalog import SCALES
from paperworks.errors import UserError, unknown


def scaled(*, smoke: Any, quick: Any, full: Any, description: str = "", **constraints: Any) -> Any:
    """A setting with a default for each scale; ``constraints`` are those of ``pydantic.Field``."""
    scales = {"smoke": smoke, "quick": quick, "full": full}
    return Field(quick, description=description, json_schema_extra={"scales": scales}, **constraints)


class Settings(BaseModel):
    """Base of every claim's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @classmethod
    def described(cls) -> list[tuple[str, str, dict[str, Any]]]:
        """Name, description, and default by scale of every setting."""
        rows = []
        for name, field in cls.model_fields.items():
            rows.append((name, field.description or "", _scales(field) or dict.fromkeys(SCALES, field.default)))
        return rows

    @classmethod
    def at(cls, scale: str, overrides: Mapping[str, Any] | None = None) -> Self:
        """The defaults of ``scale`` with ``overrides``, whose values may be text from a command line.

        Raises:
            UserError: For an unknown setting, or a value of the wrong type or range.
        """
        values = {name: scales[scale] for name, field in cls.model_fields.items() if (scales := _scales(field))}
        for name, value in (overrides or {}).items():
            if name not in cls.model_fields:
                raise unknown("setting", name, cls.model_fields)
            values[name] = _parse(value)
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "settings"
            raise UserError(
                f"setting {name}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
            ) from error


def _scales(field: FieldInfo) -> dict[str, Any] | None:
    """The defaults of a ``scaled`` setting."""
    extra = field.json_schema_extra
    scales = extra.get("scales") if isinstance(extra, dict) else None
    return dict(scales) if isinstance(scales, dict) else None


def _parse(value: Any) -> Any:
    """JSON for lists and objects; pydantic reads numbers and booleans from plain text."""
    if isinstance(value, str) and value[:1] in "[{" and value:
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
