"""Server-sent events, read as they come. Pure."""

from __future__ import annotations

from typing import NamedTuple

_MARK = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """What one event says. ``kind`` is its ``event:`` field, empty when it has none."""

    data: bytes
    kind: bytes = b""


class Reader:
    """Takes a body in pieces cut anywhere; a line ends with LF, CR LF or CR, an event with an empty line. Comments and
    fields other than ``data`` and ``event`` are passed over, and so is an event that never ended."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._kind = b""
        self._first = True

    @property
    def midway(self) -> bool:
        """Whether an event has begun and not ended."""
        return bool(self._rest.strip(b"\r\n") or self._data)

    def feed(self, piece: bytes) -> list[Event]:
        """Return the events that are whole now."""
        text = self._rest + piece
        # A CR at the end may be half of a line's end: it waits for what comes.
        held = text.endswith(b"\r")
        whole = text[:-1] if held else text
        if b"\r" in whole:
            whole = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = whole.split(b"\n")
        self._rest = rest + b"\r" if held else rest
        found = []
        for line in lines:
            event = self._line(line)
            if event is not None:
                found.append(event)
        return found

    def _line(self, line: bytes) -> Event | None:
        if self._first:
            self._first = False
            line = line.removeprefix(_MARK)
        if not line:
            return self._ended()
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        elif name == b"event":
            self._kind = value.removeprefix(b" ")
        return None

    def _ended(self) -> Event | None:
        data, kind = self._data, self._kind
        self._data, self._kind = [], b""
        return Event(b"\n".join(data), kind) if data else None
