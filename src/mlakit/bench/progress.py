"""Progress on standard error: a bar with an estimate on a terminal, a line a row elsewhere, nothing with --quiet."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import STATUS_WORDS, BenchmarkResult
from mlakit.bench.runner import Listener
from mlakit.bench.units import duration, percent, seconds, three


class Progress(Listener):
    """Shows what a run is doing; use it as a context."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._bar = RichProgress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _TimeLeft(),
            TextColumn("{task.fields[best]}", style="green", markup=False),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("looking at the device", total=None, best="")
        self._title = ""
        self._best: dict[tuple[object, ...], BenchmarkResult] = {}  # the fastest row so far, by what may be compared
        self._started = time.monotonic()
        self._done = self._expected = 0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        if not self._quiet:
            self._console.print(Text(line), soft_wrap=True)

    def expect(self, rows: int) -> None:
        """How many rows are to come."""
        self._expected = rows
        self._started = time.monotonic()
        self._bar.update(self._task, total=rows)

    def note(self, line: str) -> None:
        """See `Listener`."""
        self.say(f"note: {line}")

    def more(self, rows: int, reason: str) -> None:
        """See `Listener`."""
        self._expected += rows
        self._bar.update(self._task, total=self._expected)
        self.note(f"{rows} row{'s are' if rows > 1 else ' is'} measured again: {reason}")

    def stage(self, name: str) -> None:
        """See `Listener`."""
        self._bar.update(self._task, description=f"{self._title}{name}")

    def started(self, config: BenchmarkConfig) -> None:
        """See `Listener`."""
        self._title = f"{config.title} on {config.batch_title}: "
        best = self._best.get(config.comparison)
        self._bar.update(self._task, best=f"best {_outcome(best)} {best.config.title}" if best else "")
        self.stage("starting")

    def finished(self, row: BenchmarkResult) -> None:
        """See `Listener`."""
        best = self._best.get(row.config.comparison)
        if row.timing and (best is None or not best.timing or row.timing.median < best.timing.median):
            self._best[row.config.comparison] = row
        limit = f" ({percent(row.fraction_of_limit)} of the limit)" if row.fraction_of_limit else ""
        self.done(f"{row.config.title} on {row.config.batch_title}: {_outcome(row)}{limit}{_beside(row, best)}")

    def done(self, line: str) -> None:
        """One of those to come is done; `line` says how, where no bar shows it."""
        self._done += 1
        self._bar.advance(self._task)
        if self._console.is_terminal:
            return
        left = time_left(time.monotonic() - self._started, self._done, self._expected)
        of = f"/{self._expected}" if self._expected else ""  # a study does not know beforehand
        self.say(f"[{self._done}{of}] {line}{left}")


def _outcome(row: BenchmarkResult) -> str:
    return seconds(row.timing.median) if row.timing else STATUS_WORDS[row.status]


def _beside(row: BenchmarkResult, best: BenchmarkResult | None) -> str:
    """How a row's time compares with the best of those before it on its batch."""
    if best is None or not best.timing or not row.timing:
        return ""
    times = row.timing.median / best.timing.median
    return ", the best so far" if times < 1 else f", {three(times)}x {best.config.title}, the best so far"


def time_left(elapsed: float, done: int, expected: int) -> str:
    """Estimate ", 1:20 left" from the rows so far; empty when there are none, or none to come."""
    if not done or done >= expected:
        return ""
    return f", {duration(elapsed / done * (expected - done))} left"


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed = time_left(task.elapsed or 0.0, int(task.completed), int(task.total or 0))
        return Text(elapsed.removeprefix(", "))
