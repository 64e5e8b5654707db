"""What a device can do at most, from public data sheets, and what share of it is assumed."""

from __future__ import annotations

from dataclasses import dataclass

from reelhf.errors import UserError, did_you_mean

GPU_UTILISATION = 0.38
"""Share of the peak that executed FLOPs reach, recomputed ones included. An assumption: the MFU of Seaweed-7B's training (2504.08685),
the closest published relative of this model."""
CPU_UTILISATION = 0.5
"""`benchmarks/dit_flops.py` prints what this machine reaches."""
KEPT_FREE = 0.08
"""Share of the memory left for the driver, communication and what an allocator cannot use."""


@dataclass(frozen=True)
class DeviceSpec:
    """Dense peaks, as the data sheet has them; memory in GB of 10^9 bytes."""

    name: str
    title: str
    bf16_tflops: float
    """Tensor cores, bfloat16 with float32 sums, without sparsity."""
    fp32_tflops: float
    """Plain float32, which is what torch computes unless told otherwise."""
    memory_gb: float
    utilisation: float = GPU_UTILISATION

    def peak_flops(self, bf16: bool) -> float:
        """FLOP/s."""
        return 1e12 * (self.bf16_tflops if bf16 else self.fp32_tflops)

    @property
    def usable_bytes(self) -> float:
        return 1e9 * self.memory_gb * (1 - KEPT_FREE)


DEVICES = {
    device.name: device
    for device in (
        DeviceSpec("h100", "NVIDIA H100 SXM", 989.4, 66.9, 80.0),
        DeviceSpec("h200", "NVIDIA H200 SXM", 989.4, 66.9, 141.0),
        DeviceSpec("a100", "NVIDIA A100 SXM 80 GB", 312.0, 19.5, 80.0),
        DeviceSpec("4090", "NVIDIA GeForce RTX 4090", 165.2, 82.6, 24.0),
        # no data sheet: what a product of 2048 x 2048 matrices reached on one server core with AVX-512
        DeviceSpec("cpu", "one CPU core and 16 GB", 0.09, 0.09, 16.0, CPU_UTILISATION),
    )
}


def find_device(name: str) -> DeviceSpec:
    """By name, in any case. Raises: UserError naming the ones there are."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise UserError(
            f"--device {name}: there is no figure for it.{did_you_mean(name.lower(), DEVICES)} "
            f"Expected one of: {', '.join(DEVICES)}."
        )
    return found


def peak_flops_here(bf16: bool) -> float | None:
    """Peak FLOP/s of this process's accelerator; None for a CPU, and for one without a figure here."""
    import torch

    if not torch.cuda.is_available():
        return None
    here = torch.cuda.get_device_name().lower()
    found = [device for device in DEVICES.values() if device.name in here]
    return found[0].peak_flops(bf16) if found else None
