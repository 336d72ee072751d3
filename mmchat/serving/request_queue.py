"""A request queue for the page and the API: a few questions are answered at a time, the others wait in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from threading import Event, Lock

from ..conversation import Engine, Message, SamplingOptions, logger
from ..errors import MmchatError
from .wrapper import EngineWrapper

POLL_SECONDS = 0.5  # between two checks of a position in line


class Busy(MmchatError):
    """Too many questions are waiting."""


class Waiting(str):
    """An empty piece of text, sent while the question still waits in line.

    Attributes:
        position: its position in line; 1 is the next.
    """

    position: int

    def __new__(cls, position: int) -> Waiting:
        piece = super().__new__(cls)
        piece.position = position
        return piece


class Gate:
    """Admits questions in the order in which they came.

    Args:
        at_once: questions that are answered at the same time.
        waiting: questions that may wait; the next one is turned away.
        refused: called for each question that is turned away.
    """

    def __init__(self, at_once: int, waiting: int, refused: Callable[[], None] = lambda: None):
        self._free, self._max_waiting, self._refused = at_once, waiting, refused
        self._line: deque[Event] = deque()
        self._lock = Lock()

    @property
    def waiting(self) -> int:
        """How many questions wait."""
        return len(self._line)

    def join(self, always: bool = False) -> Event:
        """Joins the line; the event is set when it is this question's turn. Give it back with ``leave``.

        Args:
            always: join even a full line.

        Raises:
            Busy: the line is full.
        """
        with self._lock:
            ticket = Event()
            if self._free:
                self._free -= 1
                ticket.set()
            elif len(self._line) < self._max_waiting or always:
                self._line.append(ticket)
            else:
                self._refused()
                raise Busy("Too many questions are waiting. Please try again in a moment.")
            return ticket

    def leave(self, ticket: Event) -> None:
        """Ends a question's turn, or its waiting."""
        with self._lock:
            if not ticket.is_set():
                self._line.remove(ticket)
            elif self._line:
                self._line.popleft().set()
            else:
                self._free += 1

    def places(self, ticket: Event) -> Iterator[int]:
        """Waits for a question's turn, and yields its position in line every POLL_SECONDS; 1 is the next."""
        while not ticket.is_set():
            with self._lock:
                position = self._line.index(ticket) + 1 if ticket in self._line else 0
            if position:
                yield position
            ticket.wait(POLL_SECONDS)

    @contextmanager
    def turn(self) -> Iterator[Iterator[Waiting]]:
        """Joins the queue. Once the positions that it gives end, it is this question's turn, until the block ends.

        The page's own queue limits how many wait here.
        """
        ticket = self.join(always=True)
        try:
            yield map(Waiting, self.places(ticket))
        finally:
            self.leave(ticket)


class QueuedEngine(EngineWrapper):
    """An engine whose replies wait for their turn at a gate; while they wait, their pieces are ``Waiting``."""

    def __init__(self, engine: Engine, gate: Gate):
        super().__init__(engine)
        self._gate = gate

    def reply(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> Iterator[str]:
        with self._gate.turn() as line:
            yield from line
            with closing(self.engine.reply(messages, options, notify=notify)) as pieces:  # type: ignore[type-var]
                yield from pieces

    def rewrite(self, question: str, draft: str, options: SamplingOptions | None = None) -> Iterator[str]:
        with self._gate.turn() as line:
            yield from line
            with closing(self.engine.rewrite(question, draft, options)) as pieces:  # type: ignore[type-var]
                yield from pieces
