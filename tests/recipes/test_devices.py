"""Devices by the names that users give them."""

from __future__ import annotations

import pytest
import torch

from converters.torch_module import Layer
from recipes import devices
from recipes.devices import choose_device, choose_precision, computing_in
from recipes.settings import SettingsError
from tests.recipes.test_settings import sentence


def test_devices_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "mps", "cuda:-1", "cuda:x", "meta"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        choose_device(name)
    sentence(caught, repr(name), "cpu")


def layer(*shape: int, groups: int = 1) -> Layer:
    return Layer("conv", "Conv", "x", "y", "weight", None, 0, shape, groups)


@pytest.mark.parametrize("units", [True, False])
def test_precision_chosen_by_what_is_faster(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: units)
    cpu, small, large = torch.device("cpu"), layer(24, 24, 3, 3), layer(64, 64, 3, 3)
    where_large = torch.bfloat16 if units else torch.float32
    assert choose_precision("auto", [small, large], cpu) == where_large
    assert choose_precision("auto", [small], cpu) == torch.float32
    assert choose_precision("auto", [layer(2048, 1, 3, 3, groups=2048)], cpu) == torch.float32
    assert choose_precision("auto", [large], torch.device("cuda")) == torch.float32  # where nothing was measured
    assert choose_precision("float32", [large], cpu) == torch.float32
    assert choose_precision("bfloat16", [small], cpu) == torch.bfloat16


def test_a_torch_that_does_not_say_has_no_such_units(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(devices.multiplies_bfloat16(), bool)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not devices.multiplies_bfloat16()


def test_computing_in() -> None:
    a, cpu = torch.ones(2, 2), torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        with computing_in(dtype, cpu):
            assert (a @ a).dtype == dtype
