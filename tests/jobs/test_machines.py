"""The machine of a job: every GPU and machine type, what is chosen, and what is refused with what."""

from __future__ import annotations

import pytest
from google.cloud.aiplatform_v1 import AcceleratorType

from sdtune.errors import RecipeError
from sdtune.jobs.machine_table import END_OF_LIFE, GPUS, MACHINE_TYPES, Gpu, MachineType
from sdtune.jobs.machines import choose_machine, comes_with, counts_of, cpu_machine, default_type, find_gpu, types_with
from tests.servers import vertex_rules

USABLE = [gpu for gpu in GPUS if not gpu.refused]


def refused(gpu: str | None, gpus: int | None, machine_type: str | None, **more: str) -> str:
    with pytest.raises(RecipeError) as error:
        choose_machine(gpu, gpus, machine_type, **more)  # type: ignore[arg-type]
    return str(error.value)


def test_every_accelerator_of_vertex_ai_is_known() -> None:
    theirs = {one.name for one in AcceleratorType if one.name.startswith("NVIDIA_")}
    assert {gpu.accelerator_type for gpu in GPUS} | set(END_OF_LIFE) == theirs


@pytest.mark.parametrize("gpu", USABLE, ids=lambda gpu: gpu.name)
def test_a_gpu_is_found_in_any_spelling(gpu: Gpu) -> None:
    spellings = (gpu.name, gpu.name.upper(), gpu.name.replace("-", "_"), gpu.accelerator_type, gpu.quota)
    for spelling in (*spellings, gpu.accelerator_type.lower(), f" nvidia-{gpu.name} "):
        assert find_gpu(spelling) == gpu, spelling


@pytest.mark.parametrize("gpu", USABLE, ids=lambda gpu: gpu.name)
def test_a_gpu_alone_gets_the_fewest_on_a_good_machine(gpu: Gpu) -> None:
    machine = choose_machine(gpu.name, None, None)
    assert (machine.accelerator_type, machine.accelerator_count) == (gpu.accelerator_type, counts_of(gpu)[0])
    assert machine.machine_type == default_type(gpu, counts_of(gpu)[0]).name
    assert machine.vcpus >= 8
    assert machine.memory_gb >= 26


@pytest.mark.parametrize(
    ("gpu", "gpus", "machine_type"),
    [
        ("l4", 1, "g2-standard-8"),
        ("l4", 2, "g2-standard-24"),
        ("l4", 4, "g2-standard-48"),
        ("l4", 8, "g2-standard-96"),
        ("t4", 1, "n1-standard-8"),
        ("t4", 2, "n1-standard-16"),
        ("t4", 4, "n1-standard-32"),
        ("v100", 8, "n1-standard-64"),
        ("p100", 4, "n1-standard-32"),
        ("p4", 2, "n1-standard-16"),
        ("a100", 1, "a2-highgpu-1g"),
        ("a100", 16, "a2-megagpu-16g"),
        ("a100-80gb", 4, "a2-ultragpu-4g"),
        ("h100", 1, "a3-highgpu-1g"),
        ("h100", 8, "a3-highgpu-8g"),
        ("h100-mega", 8, "a3-megagpu-8g"),
        ("h200", 8, "a3-ultragpu-8g"),
        ("b200", 8, "a4-highgpu-8g"),
        ("rtx-pro-6000", 4, "g4-standard-192"),
    ],
)
def test_so_many_of_a_gpu_get_their_machine(gpu: str, gpus: int, machine_type: str) -> None:
    machine = choose_machine(gpu, gpus, None)
    assert (machine.machine_type, machine.accelerator_count) == (machine_type, gpus)


@pytest.mark.parametrize("kind", MACHINE_TYPES, ids=lambda kind: kind.name)
def test_every_machine_type_has_exactly_what_it_can_have(kind: MachineType) -> None:
    for gpu in USABLE:
        for count in range(1, 17):
            if count in kind.gpus.get(gpu.name, ()):
                machine = choose_machine(gpu.name, count, kind.name)
                assert (machine.machine_type, machine.accelerator_type, machine.accelerator_count, machine.gpu) == (
                    kind.name, gpu.accelerator_type, count, gpu,
                )  # fmt: skip
                assert (machine.vcpus, machine.memory_gb) == (kind.vcpus, kind.memory_gb)
            else:
                assert f"machine_type: {'found ' if kind.gpus else ''}{kind.name}" in refused(
                    gpu.name, count, kind.name
                )


@pytest.mark.parametrize("kind", [kind for kind in MACHINE_TYPES if comes_with(kind)], ids=lambda kind: kind.name)
def test_a_machine_type_brings_its_gpus(kind: MachineType) -> None:
    gpu = comes_with(kind)
    assert gpu
    (count,) = kind.gpus[gpu.name]
    if gpu.refused:
        assert f"{gpu.name} cannot be used: its CPU is Arm" in refused(None, None, kind.name)
        return
    machine = choose_machine(None, None, kind.name.upper())
    assert (machine.machine_type, machine.gpu, machine.accelerator_count) == (kind.name, gpu, count)
    assert f"{kind.name} comes with {count} x {gpu.name}" in refused(None, count + 1, kind.name)


def test_the_servers_table_is_the_same() -> None:
    """Written apart, from Google's documents."""
    for kind in MACHINE_TYPES:
        if kind.name.startswith("a4x"):
            continue
        assert vertex_rules.is_machine(kind.name), kind.name
        for gpu in GPUS:
            theirs = vertex_rules.counts_of(kind.name, gpu.accelerator_type)
            assert set(kind.gpus.get(gpu.name, ())) == theirs, (kind.name, gpu.name)
    known = {kind.name for kind in MACHINE_TYPES}
    assert set(vertex_rules.N1_COUNTS) <= known
    assert {name for machines in vertex_rules.ACCELERATED.values() for name in machines} <= known
    assert {gpu.accelerator_type for gpu in GPUS if gpu.flex_start} == vertex_rules.FLEX_START


def test_nothing_asked_for_is_one_l4() -> None:
    machine = choose_machine(None, None, None)
    assert (machine.machine_type, machine.accelerator_type, machine.accelerator_count) == (
        "g2-standard-8",
        "NVIDIA_L4",
        1,
    )
    assert choose_machine(None, 2, None).machine_type == "g2-standard-24"


def test_an_older_guides_machine_is_refused_with_the_right_one() -> None:
    assert refused("NVIDIA_TESLA_A100", 2, "n1-standard-8") == (
        "machine_type: found n1-standard-8 with 2 x a100. n1-standard-8 can have 1, 2 or 4 x t4, p4 or p100; "
        "1, 2, 4 or 8 x v100; for 2 x a100 use a2-highgpu-2g."
    )


@pytest.mark.parametrize(
    ("machine_type", "gpus"), [("n1-standard-16", 1), ("n1-standard-32", 2), ("n1-highmem-96", 4), ("n1-standard-8", 2)]
)
def test_machines_that_users_run_are_accepted(machine_type: str, gpus: int) -> None:
    assert choose_machine("t4", gpus, machine_type).accelerator_count == gpus


def test_a_large_machine_needs_more_of_a_small_gpu() -> None:
    said = refused("t4", 1, "n1-standard-32")
    assert "n1-standard-32 can have 2 or 4 x t4" in said
    assert "for 1 x t4 use n1-standard-8 (also: n1-standard-4, n1-standard-16," in said
    # Not told how many: as few as there can be.
    assert choose_machine("t4", None, "n1-standard-32").accelerator_count == 2


def test_a_number_that_no_machine_has_is_refused_with_those_there_are() -> None:
    assert refused("l4", 3, None) == (
        "gpus: found 3 x l4; a machine can have 1 (g2-standard-8), 2 (g2-standard-24), 4 (g2-standard-48) or "
        "8 (g2-standard-96) of l4."
    )
    assert "a machine can have 8 (a3-ultragpu-8g) of h200" in refused("h200", 1, None)


@pytest.mark.parametrize(
    ("gpu", "machine_type", "words"),
    [
        ("gb200", None, "gpu: gb200 cannot be used: its CPU is Arm"),
        ("k80", None, "gpu: k80: Vertex AI has it no more"),
        ("NVIDIA_TESLA_K80", None, "Vertex AI has it no more"),
        ("v1000", None, "did you mean v100"),
        ("tpu", None, "wanted one of p4, t4"),
        ("l44", None, "add --force-machine"),
        (None, "n1-standard-8", "has no GPU unless one is asked for; add --gpu t4, --gpu p4"),
        (None, "e2-standard-4", "can have no GPU, and training needs one; for 1 x l4 use g2-standard-8"),
        ("a100", "n2-standard-8", "for 1 x a100 use a2-highgpu-1g"),
        (None, "g2-standard-9", "did you mean g2-standard-"),
        (None, "a2-highgpu-3g", "did you mean a2-highgpu-"),
        (None, "c3-standard-8", "Vertex AI trains on no machine of the family c3"),
        (None, "xyz", "sdtune machines lists"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is_near(gpu: str | None, machine_type: str | None, words: str) -> None:
    assert words in refused(gpu, None, machine_type)


@pytest.mark.parametrize("gpu", USABLE, ids=lambda gpu: gpu.name)
def test_flex_start_has_not_every_gpu(gpu: Gpu) -> None:
    if gpu.flex_start:
        assert choose_machine(gpu.name, None, None, strategy="flex-start").gpu == gpu
    else:
        said = refused(gpu.name, None, None, strategy="flex-start")
        assert f"strategy: flex-start has no {gpu.name}, only l4, a100," in said
    assert choose_machine(gpu.name, None, None, strategy="spot").gpu == gpu


def test_force_sends_what_is_not_known() -> None:
    machine = choose_machine("NVIDIA_B300", 4, "a5-highgpu-4g", force=True)
    assert (machine.machine_type, machine.accelerator_type, machine.accelerator_count, machine.gpu) == (
        "a5-highgpu-4g", "NVIDIA_B300", 4, None,
    )  # fmt: skip
    assert choose_machine("l4", None, "g3-standard-8", force=True).accelerator_type == "NVIDIA_L4"
    assert choose_machine(None, None, "g3-standard-8", force=True).accelerator_type is None
    assert choose_machine("NVIDIA_B300", 2, "n1-standard-8", force=True).accelerator_type == "NVIDIA_B300"


def test_force_sends_a_combination_that_is_not_known() -> None:
    machine = choose_machine("a100", 2, "n1-standard-8", force=True)
    assert (machine.machine_type, machine.accelerator_type, machine.accelerator_count) == (
        "n1-standard-8", "NVIDIA_TESLA_A100", 2,
    )  # fmt: skip
    assert choose_machine("t4", None, None, strategy="flex-start", force=True).gpu


def test_force_needs_a_machine_for_a_gpu_that_is_not_known() -> None:
    with pytest.raises(
        RecipeError, match="NVIDIA_B300 is not known here, so neither is its machine; add --machine-type"
    ):
        choose_machine("NVIDIA_B300", None, None, force=True)


@pytest.mark.parametrize(
    ("gpu", "strategy", "metric"),
    [
        ("l4", "on-demand", "custom_model_training_nvidia_l4_gpus"),
        ("a100-80gb", "spot", "custom_model_training_preemptible_nvidia_a100_80gb_gpus"),
        ("h100-mega", "flex-start", "custom_model_training_preemptible_nvidia_h100_mega_gpus"),
    ],
)
def test_quotas_are_called_as_in_errors(gpu: str, strategy: str, metric: str) -> None:
    found = find_gpu(gpu)
    assert found
    assert found.quota_metric(strategy) == metric


def test_copying_has_a_small_machine_without_gpus() -> None:
    machine = cpu_machine()
    assert (machine.machine_type, machine.accelerator_type, machine.accelerator_count) == ("e2-standard-4", None, 0)
    assert (machine.vcpus, machine.memory_gb) == (4, 16)
    assert cpu_machine("N2-highmem-8").machine_type == "n2-highmem-8"
    assert cpu_machine("n1-standard-4").accelerator_type is None


@pytest.mark.parametrize(
    ("machine_type", "words"),
    [
        ("c3-standard-4", "no machine of the family c3; use one of e2 or n2"),
        ("n2d-standard-4", "no machine of the family n2d"),
        ("m3-ultramem-32", "no machine of the family m3"),
        ("g2-standard-8", "comes with GPUs, which this job has no use for; use e2-standard-4"),
        ("e2-standard-5", "did you mean e2-standard-"),
    ],
)
def test_copying_refuses_other_machines(machine_type: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        cpu_machine(machine_type)


def test_default_machines_are_among_those_of_their_gpu() -> None:
    for gpu in GPUS:
        for count in counts_of(gpu):
            assert default_type(gpu, count) in types_with(gpu, count)
