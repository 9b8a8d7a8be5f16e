"""A program at a pseudo-terminal, and what a person would see there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_S = 300.0
_WIDTH, _HEIGHT = 100, 40
_CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\r\n|\n|\r|[^\x1b\r\n]+")


class Screen:
    """Lines as a terminal shows them after some output, those that have scrolled away included.

    Knows what is used here: line ends, carriage returns, moving up, erasing a line; colours are left out.
    """

    def __init__(self) -> None:
        self.lines = [""]
        self._row = self._column = 0

    def feed(self, text: str) -> None:
        """Take in some output."""
        for match in _CONTROL.finditer(text):
            part, argument, command = match[0], match[1], match[2]
            if command == "A":
                self._row = max(0, self._row - int(argument or 1))
            elif command == "K":
                assert argument == "2", f"{part!r} is not known here"
                self.lines[self._row] = ""
            elif command is not None:
                assert command == "m", f"{part!r} is not known here"
            elif part in ("\n", "\r\n"):
                self._row, self._column = self._row + 1, 0
                self.lines += [""] * (self._row + 1 - len(self.lines))
            elif part == "\r":
                self._column = 0
            else:
                line = self.lines[self._row].ljust(self._column)
                self.lines[self._row] = line[: self._column] + part + line[self._column + len(part) :]
                self._column += len(part)

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join(line.rstrip() for line in self.lines)


class AtTerminal:
    """A program whose input, output and errors are a pseudo-terminal. A context manager that ends it."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self._end, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", _HEIGHT, _WIDTH, 0, 0))
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(end)
        self.raw = b""
        """All that it wrote so far."""

    def read_until(self, reached: Callable[[Screen], bool]) -> Screen:
        """What stands on the screen as soon as it is `reached`, or once the program has ended."""
        deadline = time.monotonic() + LONGEST_S
        while not reached(self.screen):
            assert time.monotonic() < deadline, self.screen.text
            if not select.select([self._end], [], [], 1.0)[0]:
                continue
            try:
                chunk = os.read(self._end, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            self.raw += chunk
        return self.screen

    def finish(self) -> Screen:
        """What stands on the screen at the program's end."""
        screen = self.read_until(lambda _: False)
        self.process.wait(LONGEST_S)
        return screen

    def press(self, keys: bytes) -> None:
        """Type something: `b"\\x03"` is Ctrl-C."""
        os.write(self._end, keys)

    def hang_up(self) -> None:
        """Close the terminal's window."""
        os.close(self._end)
        self._end = -1

    @property
    def screen(self) -> Screen:
        """As it is."""
        screen = Screen()
        screen.feed(self.raw.decode(errors="replace"))
        return screen

    def __enter__(self) -> AtTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        if self._end >= 0:
            self.hang_up()
