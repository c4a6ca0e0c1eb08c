"""A process that has everything imported and does nothing but fork: a child costs milliseconds instead of seconds.

It is started by its command line, not by multiprocessing, which would run the user's script again. Nothing in it ever
touches a GPU or starts PyTorch's threads, so that its children are as good as fresh.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable

COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fused_resnet.engine import child, nursery; nursery.serve(child.serve)"
)
REQUEST = struct.Struct("<bq")  # what, pid
REPLY = struct.Struct("<qq")
FORK, WAIT = 0, 1
MOST_STARTS = 3
PR_SET_PDEATHSIG = 1


class Nursery:
    """Forks children. Any thread may ask."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self._starts = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to import; the first `fork` does it as well, and waits for it."""
        with self._lock:
            self._start()

    def fork(self, pipe: int, stderr: int) -> int:
        """The pid of a new child, which serves the pipe and writes its stdout and stderr to the other descriptor."""
        with self._lock:
            self._start()
            return self._ask(FORK, 0, [pipe, stderr])[0]

    def status(self, pid: int, timeout: float) -> int | None:
        """The exit status of a child that has ended or will within this time, negative for a signal; None if not."""
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                if self.process is None:
                    return None
                ended, status = self._ask(WAIT, pid, [])
            if ended:
                return status
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)

    def close(self) -> None:
        """Ends the children as well."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            self._control.close()
            self._stderr.close()

    def _start(self) -> None:
        if self.process is not None:
            return
        if self._starts == MOST_STARTS:
            raise EOFError(f"the process that forks children ended {MOST_STARTS} times")
        self._starts += 1
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stderr = tempfile.TemporaryFile()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, json.dumps(sys.path), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
            )

    def _ask(self, what: int, pid: int, descriptors: list[int]) -> tuple[int, int]:
        try:
            socket.send_fds(self._control, [REQUEST.pack(what, pid)], descriptors)
            reply = self._control.recv(REPLY.size, socket.MSG_WAITALL)
        except OSError:
            reply = b""
        if len(reply) < REPLY.size:
            said = last_line(self._stderr)
            self._end()
            raise EOFError(f"the process that forks children is gone{said}")
        return REPLY.unpack(reply)


def last_line(file) -> str:
    """What a process said last, in brackets; empty if it was silent."""
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines()
    return f" ({lines[-1].strip()[:300]})" if lines else ""


def serve(child: Callable[[int], None]) -> None:
    """The nursery's side: fork, and tell how children ended, until the other side is gone. child(pipe) runs in each."""
    import resource  # not on every system that imports this file

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control, nursery = socket.socket(fileno=int(sys.argv[2])), os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, REQUEST.size, 2)
        if not message:
            return
        what, pid = REQUEST.unpack(message)
        if what == WAIT:
            ended, status = os.waitpid(pid, os.WNOHANG)
            control.sendall(REPLY.pack(ended, os.waitstatus_to_exitcode(status) if ended else 0))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: NumPy's library has some, and idle ones
            pid = os.fork()
        if pid == 0:
            control.close()
            _live(child, nursery, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        control.sendall(REPLY.pack(pid, 0))


def _live(child: Callable[[int], None], nursery: int, pipe: int, stderr: int) -> None:
    """All of a child's life; never returns."""
    try:
        os.dup2(stderr, 1)
        os.dup2(stderr, 2)
        with contextlib.suppress(OSError, AttributeError):  # Linux: none outlives the nursery, not even one that hangs
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == nursery:
            child(pipe)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)
