"""Errors that callers may catch. Their messages are written for the visitor of the page."""


class MmchatError(Exception):
    """Base class. The message is one or two plain sentences, safe to show to anyone."""


class BadInput(MmchatError):
    """The input cannot be used: an unreadable picture, a silent recording, an empty question."""


class AssetError(MmchatError):
    """Weights are missing or damaged and cannot be fetched."""


class WeightsError(MmchatError):
    """A weights folder does not hold what the preset needs."""


def counted(number: int, noun: str) -> str:
    """ "1 tensor", "2 tensors"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
