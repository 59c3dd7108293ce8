"""The runner's side of a worker process: requests out, events in, a limit on patience. No torch here."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STDERR_TAIL = 4000
# Seconds. A signal that comes between Python's look for signals and the beginning of a wait is only seen when the wait
# is over: a Ctrl-C just after a row was not heeded for all of the next row's patience.
_LONGEST_WAIT = 1.0


class WorkerRefusedError(ValueError):
    """The request itself was wrong; the worker lives on."""


class WorkerDiedError(RuntimeError):
    """The process ended in the middle of a request; the message says how, and in which stage."""


class WorkerTimeoutError(RuntimeError):
    """No answer within the limit; the process was killed."""


class DeviceError(RuntimeError):
    """The device could not be asked what it is: the process that tried died or did not answer."""


class Worker:
    """One worker process. Not thread-safe; `close` (or `with`) ends it.

    `source` is the folder that mlakit is imported from: this one's if None, else another version's.
    """

    def __init__(self, source: Path | None = None) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process; close() closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlakit.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            bufsize=1,
            # A Ctrl-C at the terminal is the runner's to handle: it must not kill a measurement behind its back.
            start_new_session=True,
            env=_environment(source),
        )
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the process can take a request."""
        return self._process.poll() is None

    def request(
        self, content: dict[str, Any], *, timeout: float, on_stage: Callable[[str], None] = lambda name: None
    ) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            WorkerRefusedError: the request was wrong.
            WorkerDiedError: the process ended before it answered.
            WorkerTimeoutError: it did not answer in `timeout` seconds; it is killed.
        """
        stage = "starting"
        deadline = time.monotonic() + timeout
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerDiedError(self._last_words(stage)) from None
        while True:
            left = deadline - time.monotonic()
            try:
                event = self._events.get(timeout=min(max(left, 0), _LONGEST_WAIT))
            except queue.Empty:
                if left > _LONGEST_WAIT:
                    continue
                self.close()
                raise WorkerTimeoutError(f"no result within {timeout:g} s, while {stage}") from None
            if event is None:
                raise WorkerDiedError(self._last_words(stage))
            if event["event"] == "stage":
                stage = event["name"]
                on_stage(stage)
            elif event["event"] == "refused":
                raise WorkerRefusedError(event["message"])
            else:
                if event.get("unfit"):
                    self.close()
                return event

    def close(self) -> None:
        """End the process and everything it started."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._reap()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):  # what could not be written to a process that is gone
                if stream is not None:
                    stream.close()

    def _reap(self) -> None:
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            # A Ctrl-C in the middle of `poll` leaves the lock taken for which `wait` without a limit would wait for
            # ever: one in 50 that came just after a row.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._process.pid, 0)
            self._process.returncode = -signal.SIGKILL

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._events.put(json.loads(line))
        except ValueError:  # closed under us, or cut off in the middle of a line
            pass
        self._events.put(None)

    def _last_words(self, stage: str) -> str:
        code = self._process.wait()
        if code < 0:
            number = signal.Signals(-code)
            how = f"killed by {number.name} ({signal.strsignal(number) or 'signal'})"
            if number == signal.SIGKILL:
                how += ", which is what the system does when memory runs out"
        else:
            how = f"ended with exit code {code}"
        words = self._stderr_tail()
        self.close()
        return f"{how} while {stage}" + (f"; its last words: {words}" if words else "")

    def _stderr_tail(self) -> str:
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _STDERR_TAIL))
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def _environment(source: Path | None) -> dict[str, str]:
    """The worker's environment: ours, with the right mlakit importable however we were started."""
    own = Path(__file__).resolve().parents[2]
    paths = [str(source or own), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    if source is not None:
        environment.pop("MLAKIT_COMMIT", None)  # it names ours
    return environment
