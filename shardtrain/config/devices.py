"""The devices that a config asks for, before JAX has started."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import sys

from shardtrain.errors import ConfigError
from shardtrain.mesh import init_distributed, processes_expected, simulate_devices

log = logging.getLogger("shardtrain")


def start_devices(name: str) -> str:
    """Start JAX on `auto`, `gpu`, `tpu`, `cpu` or `cpu:N` (N simulated devices in all); joins a distributed run.

    The processes of a run have N / processes each; `JAX_NUM_CPU_DEVICES` (of a launcher) says otherwise.

    Returns:
        A line to say, or "": an accelerator was found that the config does not use.

    Raises:
        ConfigError: another word, or no such device here.
    """
    import jax

    simulated = re.fullmatch(r"cpu:(\d+)", name)
    if not simulated and name not in ("auto", "cpu", "gpu", "tpu"):
        raise ConfigError(f"'{name}'", where="devices", fix="auto, gpu, tpu, cpu, or cpu:8")
    if simulated:
        if not 1 <= int(simulated.group(1)) <= 512:
            raise ConfigError(f"{simulated.group(1)} simulated devices", where="devices", fix="1 to 512")
        count = _of_this_process(int(simulated.group(1)))
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            with contextlib.suppress(RuntimeError):  # started already: simulate_devices says so
                jax.config.update("jax_platforms", "cpu")
                jax.config.update("jax_num_cpu_devices", count)
        init_distributed()  # before anything starts the backend
        if jax.process_count() == 1:
            simulate_devices(count)
        found = accelerator()
        return f"{found} is here and not used: --devices {found} uses it" if found else ""
    if name != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}[name])
    elif sys.platform == "linux" and not accelerator() and not jax.config.jax_platforms:
        # The compilers of absent devices (aot-tpu, aot-gpu) are also their runtimes, and complain at length that none is here.
        use_no_devices()
    init_distributed()
    try:
        jax.devices()
    except RuntimeError as error:
        extra = {"gpu": "cuda13", "tpu": "tpu"}.get(name, "cuda13")
        raise ConfigError(
            f"no {name} device",
            where="devices",
            why=str(error).splitlines()[0],
            fix=f"pip install 'shardtrain[{extra}]' on a machine that has one, or --devices cpu:8",
        ) from error
    return ""


def _of_this_process(count: int) -> int:
    each, processes = os.environ.get("JAX_NUM_CPU_DEVICES", ""), processes_expected()
    if each.isdigit():
        return int(each)
    if count % processes:
        raise ConfigError(
            f"{count} simulated devices cannot be divided among {processes} processes",
            where="devices",
            fix=f"--devices cpu:{-(-count // processes) * processes}, or another number of processes",
        )
    return count // processes


def use_no_devices() -> None:
    """Nothing that follows needs a device but this process's CPU."""
    import jax

    with contextlib.suppress(RuntimeError):  # started already
        jax.config.update("jax_platforms", "cpu")


def accelerator() -> str:
    """`gpu` or `tpu` if this machine seems to have one; without starting JAX on it."""
    return next((kind for kind, _ in accelerator_files()), "")


def accelerator_files() -> list[tuple[str, str]]:
    """(`gpu` or `tpu`, file) for each that drivers have put into /dev."""
    kinds = {"gpu": ("nvidia[0-9]*", "dxg", "kfd"), "tpu": ("accel[0-9]*", "vfio/[0-9]*")}
    return [
        (kind, path) for kind, names in kinds.items() for name in names for path in glob.glob(f"/dev/{name}")
    ]
