"""Device maps as Accelerate has them."""

from __future__ import annotations

from collections.abc import Mapping


def running_first(device_map: Mapping[str, str], device: str) -> dict[str, int | str]:
    """The map with a block of the device where input goes as its first one: pipelines take that for the model's."""
    by_device = sorted(device_map.items(), key=lambda entry: entry[1] != device)
    return accelerate_device_map(dict(by_device))


def accelerate_device_map(device_map: Mapping[str, str]) -> dict[str, int | str]:
    """Accelerate's form of a device map: ``"cuda:1"`` becomes ``1``, other names stay."""
    return {
        name: int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device
        for name, device in device_map.items()
    }
