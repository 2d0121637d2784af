"""Triggers by their names."""

from typing import Any

from freqdoor.codecs.architectures import import_object
from freqdoor.errors import FreqdoorError
from freqdoor.triggers.arguments import TRIGGERS
from freqdoor.triggers.base import Trigger


def build_trigger(name: str, **arguments: Any) -> Trigger:
    """A trigger with random weights, by its name in TRIGGERS.

    Raises:
        FreqdoorError: no such trigger or argument, or a value out of its range.
    """
    if name not in TRIGGERS:
        raise FreqdoorError(f"trigger {name!r}: expected one of {', '.join(TRIGGERS)}")
    try:
        trigger: Trigger = import_object(TRIGGERS[name].factory)(**arguments)
    except FreqdoorError as error:
        raise FreqdoorError(f"trigger {name!r}: {error}") from None
    return trigger
