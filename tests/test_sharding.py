"""Models divided among processes by FSDP2: the weights of one process, plain models afterwards, checkpoints for any number."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from exitkit import ExitkitError, MultiExitModel, Trainer
from exitkit.training import Distillation, Loss
from tests.test_runs import launched


class Block(nn.Module):
    """Of a Vision Transformer, before its norm; without dropout, which depends on how a batch is divided."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        added: Tensor = x + self.mlp(self.norm2(x))
        return added


class TinyViT(nn.Module):
    """Four blocks on 3×8×8 images; 15 channels do not divide by the number of processes. One weight is a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 10, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 10) * 0.02)
        self.blocks = nn.ModuleList(Block(10) for _ in range(4))
        self.norm = nn.LayerNorm(10)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.head(self.norm(tokens[:, 0])) * self.scale
        return out
