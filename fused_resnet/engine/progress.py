"""A bar on stderr with the time left."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """total: units of work. shown: None for where stderr is a terminal. Any thread may advance it."""

    def __init__(self, total: int, shown: bool | None = None):
        console = Console(stderr=True)
        columns = (TextColumn("tuning"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        hidden = not (console.is_terminal if shown is None else shown)
        what = TextColumn("{task.description}", markup=False)
        self._progress = Progress(*columns, what, console=console, transient=console.is_terminal, disable=hidden)
        self._task = self._progress.add_task("", total=total)
        self._lock = threading.Lock()
        self.count, self.total = 0, total

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *failure) -> None:
        self._progress.stop()

    def tell(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def advance(self, units: int) -> None:
        with self._lock:
            self.count += units
            self._progress.update(self._task, completed=self.count)

    def extend(self, units: int) -> None:
        """There is more to do than was known."""
        with self._lock:
            self.total += units
            self._progress.update(self._task, total=self.total)
