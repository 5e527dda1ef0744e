"""Devices by the names that users give them."""

from __future__ import annotations

import pytest
import torch

from recipes.devices import choose_device
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
