"""Processes that stay: importing torch takes seconds, so one set of them serves all tests of a module.

with Ranks(2) as ranks: ranks.run(function, *args)  # [function(rank, *args) in each], a gloo group around them
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback

import torch
import torch.distributed as dist

LIMIT_S = float(os.environ.get("FUSED_RESNET_TEST_RANKS_S", "120"))  # for a function; a collective may wait half of it


def _serve(rank: int, world: int, store: str, connection) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=LIMIT_S / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=patience)
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        function, args = pickle.loads(connection.recv_bytes())
        torch.manual_seed(0)
        try:
            answer = True, function(rank, *args)
        except Exception:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


class Ranks:
    """Once one of them has failed the others may be waiting for it, so then all are ended, and started anew."""

    def __init__(self, world: int):
        self.world, self.members, self.folder = world, [], None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc) -> None:
        self._end()

    def _start(self, module: str) -> None:
        # Forked from a process that has imported what they need, and run nothing.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([module])
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        try:
            self.folder = tempfile.TemporaryDirectory()
            for rank in range(self.world):
                here, there = context.Pipe()
                args = rank, self.world, f"{self.folder.name}/store", there
                process = context.Process(target=_serve, args=args, daemon=True)
                process.start()
                there.close()
                self.members.append((process, here))
            self._answers()
        finally:
            os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)

    def _end(self) -> None:
        for process, connection in self.members:
            process.kill()
            process.join()
            connection.close()
        self.members = []
        if self.folder is not None:
            self.folder.cleanup()

    def run(self, function, *args) -> list:
        if not self.members:
            self._start(function.__module__)
        job = pickle.dumps((function, args))
        for _, connection in self.members:
            connection.send_bytes(job)
        return self._answers()

    def _answers(self) -> list:
        found, failed = [], []
        end = time.monotonic() + LIMIT_S
        for rank, (_, connection) in enumerate(self.members):
            try:
                ready = connection.poll(0 if failed else max(0.0, end - time.monotonic()))
                fine, answer = pickle.loads(connection.recv_bytes()) if ready else (False, "no answer")
            except EOFError:
                fine, answer = False, "died"
            (found if fine else failed).append(answer if fine else f"rank {rank}: {answer}")
        if failed:
            self._end()
            raise AssertionError("\n".join(failed))
        return found
