"""Devices: where latency is measured. One file and one row a kind."""

from autoprune.evaluation.devices.base import Call, Candidate, Device
from autoprune.registry import Registry

DEVICES: Registry[Device] = Registry(
    "device",
    {
        "process": "autoprune.evaluation.devices.process:Process",
        "command": "autoprune.evaluation.devices.command:Command",
    },
)

__all__ = ["DEVICES", "Call", "Candidate", "Device"]
