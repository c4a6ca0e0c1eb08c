"""CIFAR-10, or scikit-learn's handwritten digits where it is not at hand: small enough to lie in memory."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from . import Refused
from .options import Options
from .processes import Team


@dataclass(frozen=True)
class Part:
    """images: [N, C, H, W] uint8. labels: [N] int64."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Data:
    """margin: how far a training image is moved at most, in pixels; flip: whether a mirror image is one as well."""

    name: str
    train: Part
    test: Part
    margin: int
    flip: bool
    workers: int
    classes: int = 10

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]


def load(options: Options, team: Team) -> Data:
    if options.dataset == "digits":
        return _digits()
    if options.download:
        if team.first:
            _download(options.data)
        team.wait()
    try:
        return _cifar10(options.data)
    except RuntimeError as error:  # torchvision's word for files that are missing or damaged
        if options.dataset == "cifar10" or options.download:
            raise Refused(f"--data {options.data}: {error}; --download fetches CIFAR-10") from error
    return _digits()


def _download(folder: Path) -> None:
    try:
        torchvision.datasets.CIFAR10(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise Refused(f"--download: CIFAR-10 did not come: {error}") from error


def _cifar10(folder: Path) -> Data:
    def part(train: bool) -> Part:
        found = torchvision.datasets.CIFAR10(folder, train=train)
        return Part(torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets))

    return Data("cifar10", part(True), part(False), margin=4, flip=True, workers=4)


def _digits() -> Data:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise Refused(f"--dataset digits: needs scikit-learn (pip install scikit-learn): {error}") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).unsqueeze(1).float()  # [1797, 1, 8, 8], 0 to 16
    images = interpolate(images, size=(16, 16), mode="bilinear").mul(255 / 16).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    return Data(
        "digits",
        Part(images[train], labels[train]),
        Part(images[test], labels[test]),
        margin=2,
        flip=False,
        workers=0,
    )


class Normalised(Dataset):
    """Images as the network sees them: each channel with the training images' mean 0 and deviation 1."""

    def __init__(self, part: Part, data: Data):
        self.images, self.labels = part.images, part.labels
        channels = [data.train.images[:, c].float() for c in range(data.channels)]
        self.mean = torch.stack([c.mean() for c in channels]).view(-1, 1, 1)
        self.std = torch.stack([c.std() for c in channels]).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.images[index] - self.mean) / self.std, self.labels[index]


class Augmented(Normalised):
    """The training images, moved and mirrored.

    How, follows from seed, epoch and image alone. So it does not depend on who loads the image and what was loaded
    before, and an epoch can be entered anywhere.
    """

    def __init__(self, data: Data, seed: int):
        super().__init__(data.train, data)
        self.height, self.width = self.images.shape[2:]
        self.margin, self.flip, self.seed, self.epoch = data.margin, data.flip, seed, 0
        self.images = pad(self.images, [self.margin] * 4)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = super().__getitem__(index)
        rng = np.random.default_rng((self.seed, self.epoch, index))
        top, left = rng.integers(0, 2 * self.margin + 1, size=2)
        image = image[:, top : top + self.height, left : left + self.width]
        return (image.flip(-1) if self.flip and rng.random() < 0.5 else image), label


class Loaders:
    """Batches for one process of a team. Raises Refused for a batch that cannot be divided or is too large."""

    def __init__(self, data: Data, options: Options, team: Team):
        parts = options.accumulate * team.world
        if options.batch_size % parts:
            raise Refused(
                f"--batch-size: must be a multiple of {parts} (--accumulate {options.accumulate} x {team.world} "
                f"processes), got {options.batch_size}"
            )
        self.batch = options.batch_size // parts
        self.share = self.batch * options.accumulate  # images of this process in one step
        self.train, self.test = Augmented(data, options.seed), Normalised(data.test, data)
        self.still = Normalised(data.train, data)
        self.sampler = DistributedSampler(self.train, team.world, team.rank, seed=options.seed, drop_last=True)
        self.steps = len(self.sampler) // self.share  # in an epoch
        if self.steps == 0:
            raise Refused(f"--batch-size: there are {len(self.train)} training images, got {options.batch_size}")
        self.seed, self.team = options.seed, team
        self.workers = data.workers if options.workers is None else options.workers

    def training(self, epoch: int, first: int) -> DataLoader:
        """The batches of an epoch from step `first` on, `accumulate` of them a step."""
        self.sampler.set_epoch(epoch)
        self.train.epoch = epoch
        indices = list(self.sampler)[first * self.share : self.steps * self.share]
        return self._loader(self.train, indices, self.batch, epoch)

    def testing(self) -> DataLoader:
        """This process's part of the test images. Every image is in one part: DistributedSampler would repeat some."""
        return self._whole(self.test)

    def fitted(self) -> DataLoader:
        """This process's part of the training images, neither moved nor mirrored."""
        return self._whole(self.still)

    def _whole(self, dataset: Dataset) -> DataLoader:
        indices = range(self.team.rank, len(dataset), self.team.world)
        return self._loader(dataset, indices, max(self.batch, 128), 0)

    def _loader(self, dataset: Dataset, indices: list[int] | range, batch: int, epoch: int) -> DataLoader:
        return DataLoader(
            dataset,
            batch,
            sampler=indices,
            num_workers=self.workers,
            worker_init_fn=_ignore_signals,
            pin_memory=self.team.device.type == "cuda",
            # Seeds the workers. Without it a loader would draw from PyTorch's own generator, once more in a run that
            # was resumed than in one that was not.
            generator=torch.Generator().manual_seed(self.seed + epoch * self.team.world + self.team.rank),
        )


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches the whole process group: the process that trains finishes its step, and needs its batches."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
