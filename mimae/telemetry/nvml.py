"""Power, clock, temperature and throttling of this rank's GPU, from NVIDIA's management library.

Needs the package nvidia-ml-py (`pip install 'mimae[gpu]'`), whose module is pynvml. Without it, or without a GPU, there
is nothing to read.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

COLUMNS = ("gpu_power_watts", "gpu_clock_mhz", "gpu_celsius", "gpu_throttled")

_THROTTLED = ("HwSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown", "SwThermalSlowdown", "SwPowerCap")
"""Reasons for which a GPU runs below the clock that it was asked for."""


class GPUReadings:
    """Readings of one GPU since they were last taken."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._readings: list[tuple[float, float, float, float]] = []
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            # By its UUID: the library does not know CUDA_VISIBLE_DEVICES.
            uuid = torch.cuda.get_device_properties(device).uuid
            self._gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        except Exception:  # no such package, driver, or right; a run does not need it
            return
        self._nvml = pynvml
        bits = (getattr(pynvml, f"nvmlClocksThrottleReason{name}", 0) for name in _THROTTLED)
        self._throttled = sum(set(bits))

    def read(self) -> None:
        """Take a reading. Costs some tens of microseconds, and waits for nothing on the device."""
        nvml = self._nvml
        if nvml is None:
            return
        try:
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu)
            self._readings.append(
                (
                    nvml.nvmlDeviceGetPowerUsage(self._gpu) / 1000,
                    nvml.nvmlDeviceGetClockInfo(self._gpu, nvml.NVML_CLOCK_SM),
                    nvml.nvmlDeviceGetTemperature(self._gpu, nvml.NVML_TEMPERATURE_GPU),
                    float(bool(reasons & self._throttled)),
                )
            )
        except Exception:  # a GPU that fell off the bus ends the run elsewhere
            self._nvml = None

    def take(self) -> dict[str, float | None]:
        """Return the means of the readings since the last call, by COLUMNS; None where there are none."""
        readings, self._readings = self._readings, []
        if not readings:
            return dict.fromkeys(COLUMNS)
        return {name: statistics.fmean(values) for name, values in zip(COLUMNS, zip(*readings))}
