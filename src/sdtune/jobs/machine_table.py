"""The GPUs and machine types of Vertex AI's custom training, as its documentation had them in November 2026.

Data alone; ``machines.py`` has the rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    name: the short one. accelerator_type: Vertex AI's own. memory_gib: of one of them.
    quota: its part in the names of quotas. bf16: it computes in bfloat16. flex_start: that strategy has it.
    note: what a user should know of it. refused: why no job of sdtune can run on it. own_image: why only one with an
    image of the user's can.
    """

    name: str
    accelerator_type: str
    memory_gib: int
    quota: str
    bf16: bool = True
    flex_start: bool = True
    note: str = ""
    refused: str = ""
    own_image: str = ""

    def quota_metric(self, strategy: str = "on-demand") -> str:
        """The quota that a job on it draws from; spot and flex-start have one of their own."""
        preemptible = "" if strategy == "on-demand" else "preemptible_"
        return f"custom_model_training_{preemptible}{self.quota}_gpus"


@dataclass(frozen=True)
class MachineType:
    """One machine type. gpus: how many of which GPU (by its short name) it can have; none: it has no GPU.

    sure: documented for training, and not only listed for serving.
    """

    name: str
    vcpus: int
    memory_gb: float
    gpus: dict[str, tuple[int, ...]]
    sure: bool = True


_OLD = "their torch is built for CUDA 13, which has nothing for GPUs older than Turing (T4)"
GPUS: tuple[Gpu, ...] = (
    Gpu("p4", "NVIDIA_TESLA_P4", 8, "nvidia_p4", False, False, "needs --image", own_image=_OLD),
    Gpu("t4", "NVIDIA_TESLA_T4", 16, "nvidia_t4", False, False, "cheap, slow"),
    Gpu("p100", "NVIDIA_TESLA_P100", 16, "nvidia_p100", False, False, "needs --image", own_image=_OLD),
    Gpu("v100", "NVIDIA_TESLA_V100", 16, "nvidia_v100", False, False, "needs --image", own_image=_OLD),
    Gpu("l4", "NVIDIA_L4", 24, "nvidia_l4", note="the default"),
    Gpu("a100", "NVIDIA_TESLA_A100", 40, "nvidia_a100"),
    Gpu("a100-80gb", "NVIDIA_A100_80GB", 80, "nvidia_a100_80gb"),
    Gpu("h100", "NVIDIA_H100_80GB", 80, "nvidia_h100"),
    Gpu("h100-mega", "NVIDIA_H100_MEGA_80GB", 80, "nvidia_h100_mega"),
    Gpu("rtx-pro-6000", "NVIDIA_RTX_PRO_6000", 96, "nvidia_rtx_pro_6000", flex_start=False, note="few regions"),
    Gpu("h200", "NVIDIA_H200_141GB", 141, "nvidia_h200"),
    Gpu("b200", "NVIDIA_B200", 180, "nvidia_b200"),
    Gpu(
        "gb200", "NVIDIA_GB200", 186, "nvidia_gb200", flex_start=False, note="refused: Arm CPU",
        refused="its CPU is Arm, which sdtune's images are not built for, and Vertex AI lends it for training clusters "
        "of 18 machines and more",
    ),
)  # fmt: skip
"""By memory. Sources: google.cloud.aiplatform_v1.AcceleratorType; configure-compute and schedule-jobs-dws in the
documentation of Vertex AI's training."""

END_OF_LIFE = {"NVIDIA_TESLA_K80": "Vertex AI has it no more"}
"""Still in Vertex AI's list of names."""


def _fixed(gpu: str, rows: dict[str, tuple[int, int, float]], doubtful: tuple[str, ...] = ()) -> list[MachineType]:
    """Machine types that come with their GPUs: name to how many, vCPUs and GB of memory."""
    return [
        MachineType(name, vcpus, memory, {gpu: (count,)}, name not in doubtful)
        for name, (count, vcpus, memory) in rows.items()
    ]


Counts = dict[str, tuple[int, ...]]
"""How many of which GPU."""

_SMALL: Counts = {"t4": (1, 2, 4), "p4": (1, 2, 4), "p100": (1, 2, 4)}
_EIGHT: Counts = _SMALL | {"v100": (1, 2, 4, 8)}
_SIXTEEN: Counts = _SMALL | {"v100": (2, 4, 8)}
_THIRTY_TWO: Counts = {"t4": (2, 4), "p4": (2, 4), "p100": (2, 4), "v100": (4, 8)}
_SIXTY_FOUR: Counts = {"t4": (4,), "p4": (4,), "v100": (8,)}
_N1: dict[str, tuple[float, dict[int, Counts]]] = {
    "standard": (3.75, {4: _EIGHT, 8: _EIGHT, 16: _SIXTEEN, 32: _THIRTY_TWO, 64: _SIXTY_FOUR, 96: _SIXTY_FOUR}),
    "highmem": (
        6.5,
        {2: _EIGHT, 4: _EIGHT, 8: _EIGHT, 16: _SIXTEEN, 32: _THIRTY_TWO, 64: _SIXTY_FOUR, 96: _SIXTY_FOUR},
    ),
    "highcpu": (0.9, {16: _SIXTEEN, 32: _THIRTY_TWO, 64: _SIXTY_FOUR | {"p100": (4,)}, 96: _SIXTY_FOUR}),
}
"""Kind to GB of memory for each vCPU, and by vCPUs how many of which GPU: a GPU needs a least number of them, and
serves a greatest. Source: AI Platform's compatibility matrix, which Vertex AI took over
(tensorflow/cloud, src/python/tensorflow_cloud/core/gcp.py)."""


def _without_gpus(family: str, kinds: dict[str, float], vcpus: tuple[int, ...]) -> list[MachineType]:
    """kinds: GB of memory for each vCPU."""
    return [
        MachineType(f"{family}-{kind}-{number}", number, number * each, {})
        for kind, each in kinds.items()
        for number in vcpus
    ]


MACHINE_TYPES: tuple[MachineType, ...] = tuple(
    chain(
        (
            MachineType(f"n1-{kind}-{vcpus}", vcpus, vcpus * each, gpus)
            for kind, (each, sizes) in _N1.items()
            for vcpus, gpus in sizes.items()
        ),
        _fixed(
            "l4",
            {
                "g2-standard-4": (1, 4, 16), "g2-standard-8": (1, 8, 32), "g2-standard-12": (1, 12, 48),
                "g2-standard-16": (1, 16, 64), "g2-standard-32": (1, 32, 128), "g2-standard-24": (2, 24, 96),
                "g2-standard-48": (4, 48, 192), "g2-standard-96": (8, 96, 384),
            },
        ),
        _fixed(
            "a100",
            {
                "a2-highgpu-1g": (1, 12, 85), "a2-highgpu-2g": (2, 24, 170), "a2-highgpu-4g": (4, 48, 340),
                "a2-highgpu-8g": (8, 96, 680), "a2-megagpu-16g": (16, 96, 1360),
            },
        ),
        _fixed(
            "a100-80gb",
            {
                "a2-ultragpu-1g": (1, 12, 170), "a2-ultragpu-2g": (2, 24, 340), "a2-ultragpu-4g": (4, 48, 680),
                "a2-ultragpu-8g": (8, 96, 1360),
            },
        ),
        _fixed(
            "h100",
            {
                "a3-highgpu-1g": (1, 26, 234), "a3-highgpu-2g": (2, 52, 468), "a3-highgpu-4g": (4, 104, 936),
                "a3-highgpu-8g": (8, 208, 1872),
            },
            doubtful=("a3-highgpu-1g", "a3-highgpu-2g", "a3-highgpu-4g"),
        ),
        _fixed("h100-mega", {"a3-megagpu-8g": (8, 208, 1872)}),
        _fixed("h200", {"a3-ultragpu-8g": (8, 224, 2952)}),
        _fixed("b200", {"a4-highgpu-8g": (8, 224, 3968)}),
        _fixed("gb200", {"a4x-highgpu-4g": (4, 140, 884)}),
        _fixed(
            "rtx-pro-6000",
            {
                "g4-standard-48": (1, 48, 180), "g4-standard-96": (2, 96, 360), "g4-standard-192": (4, 192, 720),
                "g4-standard-384": (8, 384, 1440),
            },
        ),
        _without_gpus("e2", {"standard": 4}, (4, 8, 16, 32)),
        _without_gpus("e2", {"highmem": 8}, (2, 4, 8, 16)),
        _without_gpus("e2", {"highcpu": 1}, (16, 32)),
        _without_gpus("n2", {"standard": 4}, (4, 8, 16, 32, 48, 64, 80, 96, 128)),
        _without_gpus("n2", {"highmem": 8}, (2, 4, 8, 16, 32, 48, 64, 80)),
        _without_gpus("n2", {"highcpu": 1}, (16, 32, 48, 64, 80, 96)),
        _without_gpus("c2", {"standard": 4}, (4, 8, 16, 30, 60)),
    )
)  # fmt: skip

DEFAULT_TYPES = {
    ("l4", 1): "g2-standard-8",
    **{
        (gpu, count): f"n1-standard-{vcpus}"
        for gpu in ("t4", "p4", "p100", "v100")
        for count, vcpus in ((1, 8), (2, 16), (4, 32), (8, 64))
        if (gpu, count) not in (("t4", 8), ("p4", 8), ("p100", 8))
    },
}
"""The machine type for so many of a GPU, where it is not the first that has them."""

UNSUPPORTED_FAMILIES = ("c2d", "c3", "m2", "m3", "n2d")
"""Of Compute Engine, but not of Vertex AI's training."""
