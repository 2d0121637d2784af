"""The one error that a user can cause."""


class FreqdoorError(Exception):
    """A mistake in what the user gave: the message says what was expected, what was found and what to do."""
