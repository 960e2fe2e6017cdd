"""GPUs, and what their vendors say that they do: the one table for MFU, plans and rates.

Arithmetic is dense (without sparsity), with sums in fp32. Links and network count one direction. Sources, by maker:

- NVIDIA data centre: data sheets of A100 (2021), H100 (2022 and NVL 2024), GH200, H200 (2024), H20, L40S, and the
  reference servers HGX/DGX B200 and B300, GB200 and GB300 NVL72. Data sheets print tensor figures with sparsity, of
  which half is dense.
- NVIDIA RTX: the architecture papers "Ada GPU Architecture" (4090, 6000 Ada) and "RTX Blackwell GPU Architecture"
  (5090, PRO 6000), rows "BF16 with FP32 accumulate" and "FP8 with FP32 accumulate".
- AMD: data sheets of Instinct MI300X and MI325X.

Memory: what `nvidia-smi` or `rocm-smi` reports as total, in MiB, where that is known (`* MIB`); drivers keep some back,
and reports of one kind of GPU differ by some MiB. Else the data sheet's decimal gigabytes (`* GB`), which is up to
7 % less than drivers report of the others.

Network: that of the maker's reference server for each GPU (200 Gb/s A100, 400 Gb/s Hopper and B200, 800 Gb/s Blackwell
Ultra), else 100 Gb/s for each GPU, an assumption that `hf-nanotron bench --rates` replaces by a measurement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GB, MIB = 10**9, 2**20
PCIE4, PCIE5 = 32 * GB, 64 * GB  # sixteen lanes, one direction


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Args:
        name: as plans and rates name it, in lower case.
        driver: regular expression of the name that the driver reports.
        bytes_: of memory.
        bf16: FLOP/s of dense products.
        fp8: the same, None where the GPU has none.
        memory: bytes/s.
        link: bytes/s to other GPUs of the host, in one direction: NVLink, Infinity Fabric or PCIe.
        network: bytes/s to other hosts, in one direction.
    """

    name: str
    driver: str
    bytes_: int
    bf16: float
    fp8: float | None
    memory: float
    link: float
    network: float


# More special names come first: a name of the driver means the first row that it matches.
GPUS = (
    GPU("h100-pcie", r"H[18]00 PCIe", 81559 * MIB, 756e12, 1513e12, 2.0e12, PCIE5, 50 * GB),
    GPU("h100-nvl", r"H100 NVL", 95830 * MIB, 835e12, 1671e12, 3.9e12, 300 * GB, 50 * GB),
    GPU("h800", r"\bH800\b", 81559 * MIB, 989e12, 1979e12, 3.35e12, 200 * GB, 50 * GB),
    GPU("h100", r"\bH100\b", 81559 * MIB, 989e12, 1979e12, 3.35e12, 450 * GB, 50 * GB),
    GPU("h200-nvl", r"\bH200 NVL", 143771 * MIB, 835e12, 1671e12, 4.8e12, 450 * GB, 50 * GB),
    GPU("h200", r"\bH200\b", 143771 * MIB, 989e12, 1979e12, 4.8e12, 450 * GB, 50 * GB),
    GPU("gh200", r"\bGH200\b", 97871 * MIB, 989e12, 1979e12, 4.0e12, 450 * GB, 50 * GB),
    GPU("h20", r"\bH20\b", 97871 * MIB, 148e12, 296e12, 4.0e12, 450 * GB, 50 * GB),
    GPU("gb300", r"\bGB300\b", 288 * GB, 2500e12, 5000e12, 8.0e12, 900 * GB, 100 * GB),
    GPU("b300", r"\bB300\b", 288 * GB, 2250e12, 4500e12, 8.0e12, 900 * GB, 100 * GB),
    GPU("gb200", r"\bGB200\b", 186 * GB, 2500e12, 5000e12, 8.0e12, 900 * GB, 50 * GB),
    GPU("b200", r"\bB200\b", 183359 * MIB, 2250e12, 4500e12, 8.0e12, 900 * GB, 50 * GB),
    GPU("a100-40gb", r"\bA100\b.*40GB", 40960 * MIB, 312e12, None, 1.555e12, 300 * GB, 25 * GB),
    GPU("a100", r"\bA100\b", 81920 * MIB, 312e12, None, 2.039e12, 300 * GB, 25 * GB),
    GPU("a800", r"\bA800\b", 81920 * MIB, 312e12, None, 2.039e12, 200 * GB, 25 * GB),
    GPU("l40s", r"\bL40S\b", 46068 * MIB, 362e12, 733e12, 0.864e12, PCIE4, 12_500_000_000),
    GPU("mi325x", r"\bMI325X\b", 256 * GB, 1307e12, 2615e12, 6.0e12, 448 * GB, 50 * GB),
    GPU("mi300x", r"\bMI300X\b", 196592 * MIB, 1307e12, 2615e12, 5.3e12, 448 * GB, 50 * GB),
    GPU("rtx-4090", r"\bRTX 4090\b", 24564 * MIB, 165.2e12, 330.3e12, 1.008e12, PCIE4, 12_500_000_000),
    GPU("rtx-5090", r"\bRTX 5090\b", 32607 * MIB, 209.5e12, 419e12, 1.792e12, PCIE5, 12_500_000_000),
    GPU("rtx-6000-ada", r"\bRTX 6000 Ada\b", 49140 * MIB, 364.2e12, 728.5e12, 0.96e12, PCIE4, 12_500_000_000),
    GPU("rtx-pro-6000", r"\bRTX PRO 6000 Blackwell\b", 96 * GB, 503.8e12, 1007.6e12, 1.792e12, PCIE5, 12_500_000_000),
)
# Names that match above, of devices that do less: parts of a GPU, those of notebooks, and other chips of one name.
OTHERS = re.compile(r"\bMIG\b|Laptop|Max-Q|RTX [45]090 D")


def gpu_of_driver(name: str) -> GPU | None:
    """The row of a device, by the name that its driver reports; None if it is not in the table."""
    if OTHERS.search(name):
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.driver, name)), None)


def find_gpu(name: str) -> GPU:
    """The row of a name, as a user or a driver writes it (`"h200"`, `"RTX 4090"`, `"NVIDIA H100 80GB HBM3"`).

    Raises:
        ValueError: for another name, with those that there are.
    """
    wanted = re.sub(r"[\s_-]+", "-", name.strip().lower())
    for gpu in GPUS:
        if wanted in (gpu.name, f"nvidia-{gpu.name}", f"amd-{gpu.name}", f"{gpu.name}-sxm"):
            return gpu
    if (found := gpu_of_driver(name)) is not None:
        return found
    raise ValueError(f"GPU {name!r} is not in the table; it has {', '.join(gpu.name for gpu in GPUS)}.")
