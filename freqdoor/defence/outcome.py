"""What a guard says of one image; nothing of how it decides, which takes longer to load than to compress."""

import math
from typing import Literal

from freqdoor.types import Result

Check = Literal["rate", "verify"]
Decision = Literal["passed", "filtered", "classical"]


class Tried(Result):
    """How the codec does with a filtered version of an image."""

    filter: str
    saved: float  # log of bytes in those expected, less than of the image itself
    gained: float | None  # log of the decoded picture's error against the image itself, less; None if not conspicuous


class Outcome(Result):
    """What a guard decided on one image, and why; logarithms are natural."""

    decision: Decision
    check: Check | None  # that stopped it
    filter: str | None  # that was sent through
    bytes_codec: int  # of the codec's bitstream of the image itself
    bytes_sent: int
    excess_rate: float  # log of the bytes, in those expected
    excess_error: float | None  # log of the decoded picture's error, in the one expected; None without verifying
    tried: tuple[Tried, ...] = ()  # where the image was conspicuous

    @property
    def reason(self) -> str:
        """The decision in a few words."""
        if self.check is None:
            return "passed: nothing that a filter of the picture would make much better"
        times = math.exp(self.excess_rate if self.check == "rate" else self.excess_error or 0)
        what = "bytes" if self.check == "rate" else "error of the decoded picture"
        sent = f"sent through {self.filter}" if self.filter else "sent as a classical codec's file"
        return f"stopped: {times:.1f} times the {what} that JPEG lets expect; {sent}, {self.bytes_sent} bytes"
