"""Results as JSON lines, flushed after every case, and a pytest plugin that writes them.

A line is {"part", "case", "event": "start"} or {"part", "case", "status", "seconds", ...}. A case that has a start and
no status took its process down. Cases with a status are not run again, so a run goes on where the one before it ended.

As a plugin (`-p benchmarks.caselog`) it is steered by environment variables: CASELOG_FILE, CASELOG_PART and
CASELOG_DEADLINE (seconds since the epoch, after which no further test is started).
"""

from __future__ import annotations

import fnmatch
import json
import os
import time
from pathlib import Path

import pytest

# What a CUDA error that spoils the whole context says, in any library's words.
POISON = (
    "CUDA error",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "CUDNN_STATUS_EXECUTION_FAILED",
)
SPOILT = "the CUDA context is spoilt"


def stands_for(pattern: str, case: str) -> bool:
    """Whether this stands for the case: its name, the beginning of its name up to a '/', or a shell's pattern."""
    return case == pattern or case.startswith(f"{pattern.rstrip('/')}/") or fnmatch.fnmatchcase(case, pattern)


class Declined(Exception):
    """This machine or this backend cannot run the case; not a failure."""


class Log:
    """The lines of one part in a file that holds those of other parts as well."""

    def __init__(self, path: str | os.PathLike, part: str):
        self.path, self.part = Path(path), part

    def write(self, **fields) -> None:
        """Append one line and force it to the disk."""
        with self.path.open("a") as file:
            file.write(json.dumps({"part": self.part, **fields}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[dict]:
        """This part's lines so far; one that was cut off while being written is passed over."""
        found = []
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line.get("part") == self.part:
                found.append(line)
        return found

    def done(self) -> dict[str, dict]:
        """By case: its last line with a status."""
        return {line["case"]: line for line in self.lines() if "status" in line}


def poisoned(message: str) -> bool:
    """Whether an error leaves the CUDA context unusable, so that the process must end."""
    return any(words in message for words in POISON)


class Plugin:
    """Notes every test, leaves out those that have a status, and ends the session at the deadline or when the CUDA
    context is spoilt; the process that watches then starts another."""

    def __init__(self, log: Log, deadline: float):
        self.log, self.deadline = log, deadline
        self.reports: list[pytest.TestReport] = []

    def pytest_sessionstart(self, session):
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        done = self.log.done()
        skipped = [item for item in items if item.nodeid in done]
        items[:] = [item for item in items if item.nodeid not in done]
        config.hook.pytest_deselected(items=skipped)
        self.log.write(event="collected", cases=len(items), done=len(skipped))

    def pytest_collectreport(self, report):
        if report.failed:
            self.log.write(case=f"collecting {report.nodeid}", status="failed", message=str(report.longrepr)[-2000:])

    def pytest_runtest_logstart(self, nodeid, location):
        self.reports = []
        self.log.write(case=nodeid, event="start")

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid, location):
        outcomes = {r.outcome for r in self.reports}
        status = next((o for o in ("failed", "skipped") if o in outcomes), "passed")
        text = "\n".join(str(r.longrepr) for r in self.reports if r.outcome == status and r.longrepr)
        extra = {k: v for r in self.reports if r.when == "call" for k, v in r.user_properties}
        if text:
            extra["message"] = text[-2000:]
        self.log.write(case=nodeid, status=status, seconds=round(sum(r.duration for r in self.reports), 3), **extra)
        if status == "failed" and poisoned(text):
            self.session.shouldstop = SPOILT
        elif time.time() > self.deadline:
            self.session.shouldstop = "the time for this part is over"

    def pytest_sessionfinish(self, session):
        self.log.write(event="stopped" if session.shouldstop else "finished", reason=str(session.shouldstop or ""))


def pytest_configure(config):
    if "CASELOG_FILE" in os.environ:
        log = Log(os.environ["CASELOG_FILE"], os.environ["CASELOG_PART"])
        config.pluginmanager.register(Plugin(log, float(os.environ["CASELOG_DEADLINE"])), "caselog-plugin")
