"""ResNets for small images, their optimizer and its learning rate."""

from __future__ import annotations

import math

import torch
import torchvision
from torch import nn

import fused_resnet
from fused_resnet import models

from .options import Options


def _stem(channels: int, planes: int) -> nn.Conv2d:
    """3x3 with stride 1: torchvision's 7x7 with stride 2 and its pool would leave little of 32x32 pixels."""
    conv = nn.Conv2d(channels, planes, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def build(options: Options, channels: int, classes: int) -> nn.Module:
    """The model on the CPU, in channels_last; its weights follow from --seed and --model, whatever --blocks is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = _network(options, channels, classes)
    if options.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if options.blocks == "fused":
        fused_resnet.swap_blocks(model)
    else:
        fused_resnet.restore_blocks(model)
    return model.to(memory_format=torch.channels_last)


def _network(options: Options, channels: int, classes: int) -> nn.Module:
    if options.model in models.FAMILY:
        stem = {} if options.model.startswith("cifar_") else {"stem": "cifar"}
        return getattr(models, options.model)(in_channels=channels, num_classes=classes, **stem)
    model = torchvision.models.get_model(options.model, weights=None, num_classes=classes)
    model.conv1, model.maxpool = _stem(channels, 64), nn.Identity()
    return model


def optimizer(model: nn.Module, options: Options) -> torch.optim.SGD:
    """SGD, with weight decay of matrices and filters: what scales and shifts (batch norms, biases) is left free."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0)


def learning_rate(step: int, steps: int, options: Options) -> float:
    """Of step 0 to steps - 1: a line up to --lr, then half a cosine down to 0. It has no state that could get lost."""
    rising = round(options.warmup * steps)
    if step < rising:
        return options.lr * (step + 1) / rising
    return options.lr * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2
