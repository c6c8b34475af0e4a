"""How far the jobs of a leaderboard are, and about how long the rest takes: by what others of their kind took here.

Imports nothing of the package.
"""

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path


class Progress:
    """Counts jobs, and says it in the terminal.

    Args:
        jobs: name -> kind and size; jobs of a kind take time in proportion to their size.
        at_once: number of jobs that run at a time.
    """

    def __init__(self, jobs: Mapping[str, tuple[str, int]], at_once: int):
        self._jobs, self._at_once = jobs, at_once
        self._started: dict[str, float] = {}
        self._done: set[str] = set()
        self._took: dict[str, tuple[float, int]] = {}  # kind -> seconds and sizes of the jobs that have ended well
        self._last_line = ""

    def start(self, name: str) -> None:
        """A job begins."""
        self._started[name] = time.monotonic()

    def end(self, name: str, well: bool = True) -> float:
        """A job has ended, or was done before. Returns its seconds."""
        self._done.add(name)
        seconds = time.monotonic() - self._started[name] if name in self._started else 0.0
        if self._started.pop(name, None) is not None and well:
            kind, size = self._jobs[name]
            before = self._took.get(kind, (0.0, 0))
            self._took[kind] = before[0] + seconds, before[1] + size
        return seconds

    def seconds_left(self) -> tuple[float, bool]:
        """About how long the rest takes, and whether that is all of it: not, where a kind has not ended yet."""
        seconds, all_known = 0.0, True
        for name, (kind, size) in self._jobs.items():
            if name in self._done:
                continue
            if kind not in self._took:
                all_known = False
                continue
            took, sizes = self._took[kind]
            running = time.monotonic() - self._started[name] if name in self._started else 0.0
            seconds += max(0.0, took / sizes * size - running)
        return seconds / self._at_once, all_known

    def __str__(self) -> str:
        """E.g. "5 of 16 jobs done, about 4 min left"."""
        text = f"{len(self._done)} of {len(self._jobs)} jobs done"
        seconds, all_known = self.seconds_left()
        if seconds:
            minutes = max(1, round(seconds / 60))
            amount = f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
            text += f", {'about' if all_known else 'more than'} {amount} left"
        return text

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._erase()
        print(time.strftime("%H:%M:%S"), text, flush=True)

    def show(self, log: Path | None) -> None:
        """Where a terminal can take it back, show how far the jobs are, and the end of the log of one that runs."""
        if not sys.stdout.isatty():
            return
        line = f"{self} · {_end_of(log)}" if log else str(self)
        if line != self._last_line:
            self._erase()
            print(line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
            self._last_line = line

    def _erase(self) -> None:
        if self._last_line:
            print("\r\033[K", end="")
            self._last_line = ""


def _end_of(log: Path) -> str:
    """The last line that is not empty, as far as it lies within the last 500 bytes."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 500))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
