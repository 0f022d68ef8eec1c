"""Meshes that lie across two real processes: the losses of a run are those of one process on one device."""

import numpy as np
import pytest
import runs
from test_two_processes import free_port

# Two fake devices a process: the first axis of each mesh goes from one process to the other.
MESHES = {
    "expert-ring": ("mesh.expert=2", "mesh.sequence=2", "model.attention_kernel=ring"),
    "stage-tensor": ("mesh.stage=2", "mesh.tensor=2"),
}
MODEL = (
    "model.num_layers=2", "model.moe.num_experts=4", "model.moe.router_z_loss=0.01", "model.vocab_multiple=4",
    "train.steps=6", "train.accumulation=2", "train.loss_chunk=16",
)  # fmt: skip


def train(workdir, *overrides, **environment):
    flags = [f"--config.{override}" for override in (*MODEL, *overrides)]
    return runs.start("train", runs.TINY, f"--workdir={workdir}", *flags, NPROC="8", **environment)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    runs.outcome(train(workdir, JAX_NUM_CPU_DEVICES="1"), 0)
    return runs.losses(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_two_processes_have_the_losses_of_one(alone, tmp_path, name):
    address = f"127.0.0.1:{free_port()}"
    both = [
        train(
            tmp_path, "mesh.data=1", *MESHES[name], JAX_NUM_CPU_DEVICES="2", LLM_JAX_COORDINATOR=address,
            LLM_JAX_NUM_PROCESSES="2", LLM_JAX_PROCESS_ID=str(number),
        )
        for number in (0, 1)
    ]  # fmt: skip
    for process in both:
        runs.outcome(process, 0)
    found = runs.losses(tmp_path)
    assert found.keys() == alone.keys() and len(found) == 6
    np.testing.assert_allclose([found[i] for i in found], [alone[i] for i in found], rtol=1e-5)
