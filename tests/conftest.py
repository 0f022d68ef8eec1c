"""The machine that every test sees: eight fake CPU devices, strict ranks, 32 bits, and caches of its own."""

import os
import tempfile

# Before anything imports jax. Child processes of the tests inherit these.
os.environ.setdefault("NPROC", "8")  # XLA's CPU collectives between processes stall with fewer threads (jax 0.10)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("LLM_JAX_COMMAND", None)  # launch/local.sh says with it how it was called; runs here are `llm-jax`
os.environ["LLM_JAX_CACHE"] = tempfile.mkdtemp(prefix="llm_jax_tests_")

import gc
import shutil

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_x64", False)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # pytest then looks once more for what was left open
    shutil.rmtree(os.environ["LLM_JAX_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def young_heap():
    """Collections pass over what earlier files left: through all of jax's traces each would take two seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    """64-bit arrays for one test: `jax.numpy.float64` references."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def cluster(tmp_path):
    """A clone with the cluster launchers, and stand-ins for what they call."""
    from clusters import Cluster

    return Cluster(tmp_path)
