"""Devices that the release of EasyEdit hard-codes."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from baft_easyedit.easyedit.compat import DeviceRemap, honoured_device


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:0", "cuda:cpu", 0, torch.device("cuda:1"), torch.device("cuda")]
)
def test_cuda_means_the_cpu_without_cuda(no_cuda, device):
    with DeviceRemap():
        assert torch.ones(2).to(device).device.type == "cpu"
        assert nn.Linear(2, 2).to(device).weight.device.type == "cpu"
        assert torch.zeros(2, device=device).cuda().device.type == "cpu"
        assert torch.arange(6).reshape(2, 3).sum(0).tolist() == [3, 5, 7]  # 0 is no device here
        assert torch.ones(2).to(device=device, dtype=torch.float64).dtype == torch.float64


def test_only_impossible_names_change_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    remap = DeviceRemap()
    device = torch.device("cuda:1")
    meant = [remap._device(name, True) for name in ("cuda:cpu", "cuda:cuda:1", "cuda:1", 1, device)]
    assert meant == ["cpu", "cuda:1", "cuda:1", 1, device]


def test_only_the_release_needs_it(no_cuda, monkeypatch):
    assert isinstance(honoured_device("current", "cpu"), nullcontext)
    assert isinstance(honoured_device("pypi", 0), DeviceRemap)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(honoured_device("pypi", 0), nullcontext)
    assert isinstance(honoured_device("pypi", "cpu"), DeviceRemap)
