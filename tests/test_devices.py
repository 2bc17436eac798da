import pytest
import torch

from baft_easyedit.generation import load_model
from baft_easyedit.model.devices import as_device, check_device, needs_missing_cuda


@pytest.fixture
def cuda(monkeypatch):
    """Sets how many CUDA devices there are."""

    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


def test_devices_are_read_as_easyedit_reads_them():
    assert as_device(1) == as_device("1") == torch.device("cuda", 1)
    assert as_device("cpu") == torch.device("cpu")
    for unknown in ("gpu", "cuda:x", -1):
        with pytest.raises(ValueError, match=f"a name such as 'cpu' or 'cuda:1'; got {unknown!r}"):
            as_device(unknown)


@pytest.mark.parametrize("device", [0, "cuda", "cuda:1"])
def test_missing_cuda_is_told(cuda, device):
    cuda(0)
    assert needs_missing_cuda(device)
    with pytest.raises(ValueError, match=f"torch finds no CUDA device; got {device!r}: give anot"):
        check_device(device)


def test_devices_beyond_the_last_are_refused(cuda):
    cuda(2)
    for there in ("cpu", 0, 1, "cuda", "cuda:1"):
        check_device(there)
        assert not needs_missing_cuda(there)
    assert not needs_missing_cuda("cuda:2")
    with pytest.raises(ValueError, match="torch finds CUDA devices 0 to 1 only; got 'cuda:2'"):
        check_device("cuda:2")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="it is there")
def test_other_devices_that_torch_was_built_without_are_refused():
    with pytest.raises(ValueError, match=r"device must be on this machine; got 'mps'.*or 'cpu'"):
        check_device("mps")


def test_model_is_not_loaded_for_a_missing_device(cuda):
    cuda(0)
    with pytest.raises(ValueError, match=r"device must be on this machine.*no CUDA device; got 0"):
        load_model("no-such-model", 0)
