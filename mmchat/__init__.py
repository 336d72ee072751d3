"""mmchat: ask a small vision-language model about pictures, by typing or speaking.

import mmchat

engine = mmchat.load("smol")
question = mmchat.Message("user", "What is in this picture?", images=["dog.jpg"])
answer = "".join(engine.reply([question]))  # or print the pieces as they stream in
"""

import importlib
import logging

from .errors import AssetError, BadInput, MmchatError, WeightsError

__version__ = "0.2.0.dev0"
__all__ = [
    "AssetError",
    "BadInput",
    "Engine",
    "LocalEngine",
    "Message",
    "MmchatError",
    "SamplingOptions",
    "WeightsError",
    "load",
    "open_image",
]

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it warns about an optional kernel

# Imported on first use: torch takes seconds to import, and `--help` should not wait for it.
_LAZY = {
    "Engine": ("conversation", "Engine"),
    "LocalEngine": ("engine", "LocalEngine"),
    "Message": ("conversation", "Message"),
    "SamplingOptions": ("conversation", "SamplingOptions"),
    "load": ("engine", "load"),
    "open_image": ("media", "open_image"),
}


def __getattr__(name: str):
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(f".{module}", __name__), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
