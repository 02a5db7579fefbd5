"""Peak dense FLOP/s of a device's matrix units, from the vendors' data sheets."""

from __future__ import annotations

from lpl_pretrain.config.schema import Precision

TERA = 1e12
PEAKS: dict[str, dict[str, float]] = {
    "B200": {"fp32": 75, "bf16": 2250, "fp16": 2250, "fp8": 4500},
    "H200": {"fp32": 67, "bf16": 989, "fp16": 989, "fp8": 1979},
    "H100 PCIe": {"fp32": 51, "bf16": 756, "fp16": 756, "fp8": 1513},
    "H100 NVL": {"fp32": 60, "bf16": 835, "fp16": 835, "fp8": 1671},
    "H100": {"fp32": 67, "bf16": 989, "fp16": 989, "fp8": 1979},
    "A100": {"fp32": 19.5, "bf16": 312, "fp16": 312},
    "A10G": {"fp32": 35, "bf16": 70, "fp16": 70},
    "L40S": {"fp32": 91.6, "bf16": 362, "fp16": 362, "fp8": 733},
    "L4": {"fp32": 30.3, "bf16": 121, "fp16": 121, "fp8": 242},
    "RTX 4090": {"fp32": 82.6, "bf16": 165, "fp16": 165, "fp8": 330},
    "RTX 3090": {"fp32": 35.6, "bf16": 71, "fp16": 71},
    "V100": {"fp32": 15.7, "fp16": 125},
    "T4": {"fp32": 8.1, "fp16": 65},
}
"""Part of the device's name, the more special one first -> TFLOP/s by precision, without sparsity
and with float32 sums.
"""


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """FLOP/s, or None for a device or precision that is not in the table (every CPU)."""
    for name, peaks in PEAKS.items():
        if name in device_name:
            peak = peaks.get(precision.value)
            return None if peak is None else peak * TERA
    return None
