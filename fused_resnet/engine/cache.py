"""What was measured, remembered: a JSON file for each environment, and tables of the same form in the package.

A file can be truncated, of another version, or nonsense: what in it does not hold is ignored, with one warning, and is
gone with the next write. Writers merge under a lock and replace the file at once, so that two processes lose nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .. import doctor
from ..backends import library

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

logger = logging.getLogger("fused_resnet")

SCHEMA = 1
VARIABLE = "FUSED_RESNET_CACHE"
TABLES = Path(__file__).parent / "tables"
LARGEST = 2**26  # bytes; a network leaves some hundred KiB
# A table is such a file, copied. It serves its device: what else differs, its choices are verified in another process.
DEVICE_FACTS = ("device", "capability", "multiprocessors", "cpu", "threads")


def folder() -> Path | None:
    """FUSED_RESNET_CACHE, or ~/.cache/fused_resnet; None where there is no home."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    try:
        return Path.home() / ".cache" / "fused_resnet"
    except RuntimeError:
        return None


def environment(device: torch.device) -> dict:
    """What a measured time depends on besides the problem."""
    found = doctor.environment()
    facts = {name: found[name] for name in ("fused_resnet", "torch", "triton")}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts |= {"device": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
        facts["compiled"] = library.kernels_digest()
        return facts | {name: found[name] for name in ("driver", "cuda", "cudnn")}
    return facts | {"device": device.type, "cpu": found["cpu"], "threads": found["threads"]}


class Cache:
    """Entries by problem id for one environment. folder: None for none. The tables' entries serve where the
    file has none."""

    def __init__(self, folder: Path | str | None, environment: dict):
        self.environment = environment
        self.path, self._told = None, False
        try:
            folder = None if folder is None else Path(folder).expanduser()
        except RuntimeError as failure:
            self._tell(f"{folder}: what is measured is not kept ({failure})")
            folder = None
        if folder is not None:
            device = re.sub(r"[^a-z0-9]+", "-", str(environment.get("cpu") or environment.get("device")).lower())
            digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]
            self.path = folder / f"{device.strip('-')[:40]}-{digest}.json"
        self.entries = self._own()
        self.exact: dict[str, dict] = {}  # of tables measured in this very environment
        self.near: dict[str, dict] = {}  # on this device, under other versions
        # On other devices of this generation, or by the user under other versions: nothing but forecasts comes from it.
        self.akin: dict[str, dict] = {}
        for table in sorted(TABLES.glob("*.json")):
            measured_in, entries = read(table, self._tell)
            if measured_in == environment:
                self.exact |= entries
            elif all(measured_in.get(fact) == environment.get(fact) for fact in DEVICE_FACTS):
                self.near |= entries
            elif self._of_kin(measured_in):
                self.akin |= entries
        for path in sorted(self.path.parent.glob("*.json")) if self.path and self._of_kin(environment) else []:
            if path != self.path:
                measured_in, entries = read(path, lambda message: None)
                self.akin |= entries if self._of_kin(measured_in) else {}

    def _of_kin(self, measured_in: dict) -> bool:
        return measured_in.get("capability", "") == self.environment.get("capability")

    def __str__(self):
        where = self.path if self.path else "nowhere"
        kin = f", {len(self.akin)} of its kin or of other versions" if self.akin else ""
        return (
            f"{len(self.entries)} problems in {where}, {len({**self.exact, **self.near})} in the package's tables{kin}"
        )

    def find(self, problem_id: str) -> tuple[dict | None, str, bool]:
        """(entry or None, 'cache' or 'table', whether it was measured in this very environment)."""
        for entries, source, known in ((self.entries, "cache", True), (self.exact, "table", True)):
            if problem_id in entries:
                return entries[problem_id], source, known
        return self.near.get(problem_id), "table", False

    def alike(self) -> Iterable[dict]:
        """What was measured on this device and on its kin, each problem once, of what tells what work it is of."""
        found: dict[str, dict] = {}
        for entries in (self.akin, self.near, self.exact, self.entries):
            found |= {key: entry for key, entry in entries.items() if "work" in entry}
        return found.values()

    def store(self, results: dict[str, dict]) -> None:
        """Add entries; those that other processes have written meanwhile stay. A folder that cannot be written to costs
        a warning."""
        self.entries |= results
        if self.path is None or not results:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                self.entries = {**self.entries, **self._own(), **results}
                _replace(self.path, dump(self.environment, self.entries))
        except OSError as failure:
            self._tell(f"{self.path.parent}: what was measured is not kept ({failure.strerror or failure})")

    def _own(self) -> dict[str, dict]:
        measured_in, entries = read(self.path, self._tell) if self.path else ({}, {})
        return entries if measured_in == self.environment else {}

    def _tell(self, message: str) -> None:
        if not self._told:
            self._told = True
            logger.warning("tuning cache: %s", message)


def read(path: Path, tell: Callable[[str], None]) -> tuple[dict, dict[str, dict]]:
    """(environment, its valid entries) of a file; both empty where there is none, or it is damaged."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("it is too large")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is not a cache of this package")
        if type(schema := content.get("schema")) is not int or schema != SCHEMA:
            raise ValueError(f"its schema is {str(schema)[:20]}, not {SCHEMA}")
        measured_in, entries = content.get("environment"), content.get("entries")
        if not isinstance(measured_in, dict) or not isinstance(entries, dict):
            raise ValueError("it has no environment or no entries")
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, RecursionError) as failure:
        tell(f"{path} is ignored: {str(failure)[:200]}")
        return {}, {}
    valid = {key: entry for key, entry in entries.items() if _is_entry(entry)}
    if len(valid) < len(entries):
        tell(f"{path}: {len(entries) - len(valid)} of {len(entries)} entries are damaged and ignored")
    return measured_in, valid


def dump(environment: dict, entries: dict[str, dict]) -> str:
    content = {"schema": SCHEMA, "environment": environment, "entries": dict(sorted(entries.items()))}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _is_candidate(value) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"backend", "label", "config"}
        and isinstance(value["backend"], str)
        and isinstance(value["label"], str)
        and isinstance(value["config"], dict)
    )


def _is_seconds(value) -> bool:
    if value is None:
        return True
    numbers = isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) for v in value)
    return numbers and all(1e-9 < v < 1e6 for v in value) and value == sorted(value)


def _is_entry(entry) -> bool:
    """{"chosen": candidate, "candidates": digest of all there were, "trials": [{"candidate", "seconds": [p20, p50, p80]
    or null, "reason": why it is out, or null}], "work": what forecasts need, or not there}."""
    try:
        json.dumps(entry, allow_nan=False)
    except (ValueError, RecursionError):  # 1e999 is read as infinity, and could not be written again
        return False
    if not (isinstance(entry, dict) and entry.keys() - {"work"} == {"chosen", "candidates", "trials"}):
        return False
    if "work" in entry and not _is_work(entry["work"]):
        return False
    if not (_is_candidate(entry["chosen"]) and isinstance(entry["candidates"], str)):
        return False
    return isinstance(entry["trials"], list) and all(map(_is_trial, entry["trials"]))


def _is_work(value) -> bool:
    if not (isinstance(value, dict) and value.keys() == {"kind", "sizes", "traits", "flops", "bytes"}):
        return False
    if not (isinstance(value["kind"], str) and isinstance(value["sizes"], dict) and isinstance(value["traits"], dict)):
        return False
    numbers = [*value["sizes"].values(), value["flops"], value["bytes"]]
    simple = all(isinstance(trait, (bool, int, str)) for trait in value["traits"].values())
    return simple and bool(value["sizes"]) and all(type(n) is int and 0 < n < 2**63 for n in numbers)


def _is_trial(value) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"candidate", "seconds", "reason"}
        and _is_candidate(value["candidate"])
        and _is_seconds(value["seconds"])
        and isinstance(value["reason"], (str, type(None)))
    )


@contextlib.contextmanager
def _locked(path: Path):
    if fcntl is None:
        yield
        return
    with open(path, "a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: merging on write has to do
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file unlocks it


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with open(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
