"""The errors a caller may catch. Their text is written for the person in front of the page."""


class MmchatError(Exception):
    """Anything mmchat can explain: the message is one or two plain sentences, safe to show to anyone."""


class BadInput(MmchatError):
    """What the person sent cannot be used: an unreadable picture, a silent recording, an empty question."""


class AssetError(MmchatError):
    """Weights are missing or damaged, and could not be fetched."""


class WeightsError(MmchatError):
    """A weights folder does not hold what the preset needs."""
