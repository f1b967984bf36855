"""What parts of a recipe have in common."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict


# YAML reads 1e-3, without a point, as a string.
Number = Annotated[float, BeforeValidator(lambda value: float(value) if isinstance(value, str) else value)]


class Section(BaseModel):
    """A part of a recipe: no unknown fields, no conversions between types, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
