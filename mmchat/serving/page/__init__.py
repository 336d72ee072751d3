"""The web page, in small files; it sends plain data to the engine and gets text back.

layout.py         the layout, and which event calls which function
turns.py          ask, retry, undo, stop: one turn of a conversation
history.py        the page's conversation and the engine's messages, one made from the other
branches.py       other answers to a question, and editing an earlier one
details.py        what the collapsible section tells about an answer
conversations.py  the list of conversations in the visitor's browser; list.js, store.js and transfer.js keep them
voice.py          the Voice tab, reading aloud, hands-free talk; voice.js plays and listens
batch.py          the page "Batch"
thumbs.py         thumbs and better answers, where feedback is stored; thumbs.js keeps the thumbs lit
settings.py       the visitor's settings
visit.py          which request may write to the page
components.py     inputs that take uploads only
examples.py       the cards of an empty conversation
front_end.py      sends gradio's own scripts and style sheets
assets.py         reads the scripts and the style sheet
page.css page.js  looks, and the little that must happen in the browser; buttons.js puts buttons on messages
"""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

from .examples import read_examples
from .history import DRAFT, History, to_messages
from .layout import MAX_CONCURRENT, MAX_WAITING, Parts, build, launch
from .turns import Page
from .visit import Visit

__all__ = [
    "DRAFT",
    "MAX_CONCURRENT",
    "MAX_WAITING",
    "History",
    "Page",
    "Parts",
    "Visit",
    "build",
    "launch",
    "read_examples",
    "to_messages",
]
