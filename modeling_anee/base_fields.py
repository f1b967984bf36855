"""Fields of the base's configuration, at the top of ours: one value, kept in one place."""

from typing import Any


class OfBase:
    """A field of the base's own config, which is read where scripts and transformers look for it: at the top.

    Args:
        settable: whether it may be changed; what is set goes into the base's config. Shapes are what they are.
    """

    def __init__(self, settable: bool = False) -> None:
        self._settable = settable

    def __set_name__(self, owner: type, name: str) -> None:
        """Take the name that the class gives it."""
        self._name = name

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        """What the base's config has; an AttributeError where it has none."""
        return self if config is None else getattr(config.text_config, self._name)

    def __set__(self, config: Any, value: Any) -> None:
        """Change it in the base's config, or refuse another value."""
        if self._settable:
            setattr(config.text_config, self._name, value)
        elif value != (own := getattr(config.text_config, self._name, None)):
            raise ValueError(f"{self._name}={value!r} is not allowed: it is the base's, which has {own!r}")
