"""Machines to hold a plan against: what the makers say they have."""

from typing import NamedTuple

GIB = 2**30


class Machine(NamedTuple):
    """Memory in bytes; `flops` is the dense bfloat16 (T4: float16) peak per second.

    `host` is what the machine is usually rented with.
    """

    name: str
    device: int
    host: int
    flops: float


MACHINES = (
    Machine("Colab T4", 15 * GIB, 12 * GIB, 65e12),
    Machine("L4", 22 * GIB, 48 * GIB, 121e12),
    Machine("TPU v5e-1", 16 * GIB, 47 * GIB, 197e12),
    Machine("A100-80", 79 * GIB, 160 * GIB, 312e12),
    Machine("H200", 139 * GIB, 128 * GIB, 989e12),
)
