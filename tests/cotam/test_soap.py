"""SOAP, which gets weights of 1x1 convolutions as matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from pytorch_optimizer import SOAP

from cotam.train.trainer import _SOAP_FREQUENCY, _SOAP_MAX_DIM, _soap


def test_soap_trains_1x1_convolutions_as_well_by_their_matrices() -> None:
    """That is less work. On one thread the steps are the same bits; with more it rounds, and so turns, otherwise."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 6, 8, 8), torch.randn(4, 6, 8, 8)
    start = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 1), torch.nn.Conv2d(6, 6, 3, padding=1), torch.nn.Conv2d(6, 6, 1))
    falls = []
    for is_plain in (True, False):
        network = copy.deepcopy(start).to(memory_format=torch.channels_last)
        group, options = {"params": list(network.parameters())}, {"lr": 0.01, "weight_decay": 0.01}
        settings = {"precondition_frequency": _SOAP_FREQUENCY, "max_precondition_dim": _SOAP_MAX_DIM}
        optimizer = SOAP([group], **options, **settings) if is_plain else _soap([group], **options)
        losses = []
        for _ in range(2 * _SOAP_FREQUENCY + 5):  # beyond the first eigenbases
            loss = (network(x) - y).square().mean()
            losses.append(loss.item())
            network.zero_grad()
            loss.backward()
            optimizer.step()
        falls.append(losses[0] - losses[-1])
        assert all(not torch.equal(p, before) for p, before in zip(group["params"], start.parameters(), strict=True))
    assert falls[0] > 0.2 and falls[1] == pytest.approx(falls[0], rel=0.05)
