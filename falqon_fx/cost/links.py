"""What connects the GPUs of a machine, and machines: rates each way as vendors print them.

No transfer reaches them, and nothing here was measured: a time from them is the least it can take.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """``bandwidth``: bytes/s that one GPU sends while it receives as many."""

    name: str
    bandwidth: float
    source: str


_NVLINK_4 = Link(
    "NVLink 4", 450e9, "NVIDIA H100 and H200 Tensor Core GPU datasheets, SXM: 900 GB/s both ways"
)
_PCIE_4 = "PCIe 4.0 x16: 64 GB/s both ways (NVIDIA L40S datasheet)"
LINKS = {
    "RTX 4090": Link("PCIe 4.0 x16", 32e9, _PCIE_4),
    "L40S": Link("PCIe 4.0 x16", 32e9, _PCIE_4),
    "H100": _NVLINK_4,
    "H200": _NVLINK_4,
    "B200": Link("NVLink 5", 900e9, "NVIDIA Blackwell datasheet, HGX B200: 1.8 TB/s both ways"),
    "MI300X": Link(
        "Infinity Fabric", 448e9, "AMD Instinct MI300X datasheet: 7 links of 128 GB/s both ways"
    ),
    "RTX 5090": Link("PCIe 5.0 x16", 64e9, "PCI-SIG: twice PCIe 4.0's rate"),
}
NETWORK = Link(
    "400 Gb/s a GPU",
    50e9,
    "NVIDIA DGX H100: a ConnectX-7 of 400 Gb/s for each GPU; assumed for all",
)


def link_of(card: str) -> Link | None:
    """What connects cards of this name within a machine; a calibrated one has its GPU's name."""
    fits = [name for name in LINKS if name.casefold() in card.casefold()]
    return LINKS[max(fits, key=len)] if fits else None


def share(collective: str, processes: int) -> float:
    """How often the bytes of a collective pass through a process's link each way, in a ring."""
    once = (processes - 1) / processes
    return 2 * once if collective == "all-reduce" else once
