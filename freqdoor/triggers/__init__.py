"""Triggers T: functions from a clean image to a poisoned one that looks the same."""

from typing import Any

from freqdoor.errors import FreqdoorError
from freqdoor.triggers.adaptive_dct import AdaptiveDCT
from freqdoor.triggers.base import PAPER_EPS, Trigger, budget_penalty, project
from freqdoor.triggers.ftrojan import FTrojan
from freqdoor.triggers.lira import Lira
from freqdoor.triggers.universal import Universal

TRIGGERS: dict[str, type[Trigger]] = {
    "adaptive-dct": AdaptiveDCT,
    "lira": Lira,
    "ftrojan": FTrojan,
    "universal": Universal,
}

__all__ = [
    "PAPER_EPS",
    "TRIGGERS",
    "AdaptiveDCT",
    "FTrojan",
    "Lira",
    "Trigger",
    "Universal",
    "budget_penalty",
    "build_trigger",
    "project",
]


def build_trigger(name: str, **arguments: Any) -> Trigger:
    """A trigger with random weights, by its name in TRIGGERS."""
    if name not in TRIGGERS:
        raise FreqdoorError(f"trigger {name!r}: expected one of {', '.join(TRIGGERS)}")
    try:
        return TRIGGERS[name](**arguments)
    except TypeError as error:
        raise FreqdoorError(f"trigger {name!r}: {error}") from None
