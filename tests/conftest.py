"""Eight simulated CPU devices for every test; fewer is a failure, not a skip."""

import os
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
# Hundreds of processes start here; each would compile our sources anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Half of a cold suite would be LLVM optimizing programs that run for milliseconds; partitioning and fusion stay.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
).strip()

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
    assert jax.device_count() == 8, f"the tests need 8 simulated devices, found {jax.device_count()}"
