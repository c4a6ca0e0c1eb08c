"""Files that are whole or not there, and what a run must have in common with the one it goes on with."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from . import Refused
from .options import FREE, Options
from .processes import Team


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """A process killed at any time leaves the former file or the new one, never a part of one."""
    temporary = path.with_name(f"{path.name}.part")
    with open(temporary, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def save(path: Path, content: dict) -> None:
    write_whole(path, lambda f: torch.save(content, f))


def load(path: Path) -> dict:
    """What `save` wrote, on the CPU. Raises Refused, with the path, for a file that is damaged or something else."""
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch's reader does not look at the checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} has another checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise Refused(f"{path}: is damaged or no checkpoint ({error}); --fresh starts anew") from error
    if not isinstance(content, dict) or "setting" not in content:
        raise Refused(f"{path}: is no checkpoint of the examples; --fresh starts anew")
    return content


def setting(options: Options, dataset: str, team: Team) -> dict:
    """All that the numbers of a run follow from."""
    chosen = {f"--{name.replace('_', '-')}": v for name, v in asdict(options).items() if name not in FREE}
    return {**chosen, "--dataset": dataset, "--device": team.device.type, "number of processes": team.world}


def require_same(path: Path, saved: dict, now: dict) -> None:
    if "--capture" in now:
        saved = {"--capture": False, **saved}  # younger than the first of these files
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        differences = "; ".join(f"{n} was {saved.get(n)}, is {now.get(n)}" for n in names)
        raise Refused(f"{path}: belongs to another run: {differences} (--fresh starts anew, --out elsewhere)")


def random_state(device: torch.device) -> dict:
    """Of every generator that code in a training loop might draw from."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict, device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
