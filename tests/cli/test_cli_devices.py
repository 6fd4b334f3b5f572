"""What JAX is started on where a config leaves it open."""

import os
import subprocess
import sys

CODE = """
import jax
import shardtrain.config.devices as devices
devices.accelerator_files = lambda: {files}
devices.init_distributed = lambda: print(jax.config.jax_platforms)
devices.start_devices("auto")
"""


def started(files, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | variables
    command = [sys.executable, "-c", CODE.format(files=files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout.strip()


def test_nothing_is_looked_for_that_is_not_here():
    """Compilers of absent devices are installed on laptops: asked for their devices, each writes a page to stderr. Failed
    once so, and once where neither what is here nor what the user says was asked."""
    assert started([]) == "cpu"
    assert started([("tpu", "/dev/vfio/0")]) == "None"
    assert started([], JAX_PLATFORMS="cuda") == "cuda"
