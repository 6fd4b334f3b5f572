"""Many processes as one JAX program."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import jax

from shardtrain.errors import LaunchError, RunError, ShardTrainError, first_line

log = logging.getLogger("shardtrain")

# What each environment sets: (variable with the number of processes, name to say).
_CLUSTERS = (
    ("JAX_NUM_PROCESSES", "JAX environment variables"),
    ("SLURM_NTASKS", "SLURM"),
    ("OMPI_COMM_WORLD_SIZE", "Open MPI"),
    ("JOB_COMPLETIONS", "Kubernetes"),
)


def init_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 20,
) -> str:
    """Join the other processes of this run; does nothing where there is only one.

    Args:
        coordinator: `host:port` of process 0. Without it the cluster is detected (SLURM, Open MPI,
            GKE, Cloud TPU, or `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`).
        num_processes, process_id: with `coordinator`.
        local_device_ids: GPUs of this process. Default: `JAX_LOCAL_DEVICE_IDS`, or this host's GPUs divided
            evenly among the processes on it, so that one process per 8-GPU host sees all eight.
        initialization_timeout, heartbeat_timeout: seconds.

    The coordinator listens on its own address alone, or on `JAX_COORDINATOR_BIND_ADDRESS`. An uncaught exception of a
    process that has joined ends it at once: JAX's own exit would wait for processes that wait for it.

    Returns:
        One line about what was found, also logged.

    Raises:
        LaunchError: the arguments are incomplete, or there are other devices than the launcher counted on
            (`SHARDTRAIN_TOTAL_DEVICES`). RunError: the others do not answer in time.
    """
    found = "explicit arguments"
    environment = os.environ
    if coordinator is None and num_processes is None and process_id is None:
        found = _detect()
        if not found:
            return _say("one process; nothing to join")
        if "JAX_COORDINATOR_ADDRESS" in environment and "JAX_NUM_PROCESSES" in environment:
            coordinator = environment["JAX_COORDINATOR_ADDRESS"]
            num_processes = int(environment["JAX_NUM_PROCESSES"])
            names = ("JAX_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
            process_id = int(next((environment[n] for n in names if n in environment), "0"))
    if coordinator is None and (num_processes or process_id):
        raise LaunchError(
            "number or id of the process was given, but no coordinator",
            where="init_distributed",
            fix="init_distributed('host:port', num_processes, process_id)",
        )
    if num_processes == 1:
        return _say("one process; nothing to join")
    if coordinator is not None:
        if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
            raise LaunchError(
                f"process {process_id} of {num_processes}",
                where="init_distributed",
                fix="process_id from 0 to num_processes - 1",
            )
        if not re.fullmatch(r"\S+:\d+", coordinator):
            raise LaunchError(f"'{coordinator}' is not host:port", where="init_distributed", fix="host:1234")
    if coordinator is not None and process_id:
        _until_it_listens(coordinator, min(10.0, initialization_timeout / 2))
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=local_device_ids if local_device_ids is not None else _local_gpus(),
            coordinator_bind_address=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator),
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        if "already" in str(error) or "only be called once" in str(error):
            return _say(f"process {jax.process_index()} of {jax.process_count()} (joined before)")
        raise RunError(
            f"could not join: {str(error).splitlines()[0]}",
            where="init_distributed",
            why=f"found: {found}; coordinator {coordinator or 'detected'}",
            fix="check that every process is started and can reach the coordinator's port",
        ) from error
    _leave_at_once()
    _count_devices()
    _cache_what_it_compiles()
    return _say(
        f"{found}: process {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} of {jax.device_count()} {jax.devices()[0].platform} devices"
    )


def _until_it_listens(coordinator: str, seconds: float) -> None:
    """Come when the coordinator is there: gRPC, refused once, tries again after a whole second."""
    host, _, port = coordinator.rpartition(":")
    until, pause = time.monotonic() + seconds, 0.02
    while time.monotonic() < until:  # then JAX says what is wrong
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
            return
        except OSError:
            time.sleep(pause)
            pause = min(2 * pause, 0.5)


def processes_expected() -> int:
    """How many processes the environment speaks of, before any has joined."""
    for variable, _ in _CLUSTERS:
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return 1


def wait_for_all(where: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def gathered(text: str) -> list[str]:
    """Each process's text, in their order; all call this together. Sends twice what the longest takes, from each to all."""
    if jax.process_count() == 1:
        return [text]
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(data.size)))
    padded = np.pad(data, (0, int(sizes.max()) - data.size))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def leave(code: int) -> None:
    """End this process now where others have joined it; JAX's exit would wait for them, and they for this one."""
    if jax.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _leave_at_once() -> None:
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        leave(2 if isinstance(error, ShardTrainError) and not isinstance(error, RunError) else 3)

    sys.excepthook = hook


def _count_devices() -> None:
    wanted = os.environ.get("SHARDTRAIN_TOTAL_DEVICES", "")
    if wanted.isdigit() and int(wanted) != jax.device_count():
        raise LaunchError(
            f"{jax.device_count()} devices in {jax.process_count()} processes, the launcher counted on {wanted}",
            where="init_distributed",
            why=f"process {jax.process_index()} has {jax.local_device_count()}",
            fix="processes per host and devices per process as they are on the hosts",
        )


def _cache_what_it_compiles() -> None:
    """On simulated devices the key of a cached program is each process's own, and JAX writes those of process 0 alone: the others
    would compile anew at every start. GPUs and TPUs have one key for all.
    """
    if jax.process_index() == 0 or jax.devices()[0].platform != "cpu":
        return
    from jax._src import compilation_cache, compiler  # no public name says who writes

    def write(key: str, seconds: float, name: str, backend: Any, executable: Any) -> None:
        if seconds < jax.config.jax_persistent_cache_min_compile_time_secs:
            return
        try:
            compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))
        except Exception as error:  # no reason to stop a program that is compiled
            log.warning("%s was not cached: %s", name, first_line(error))

    compiler._cache_write = write  # type: ignore[assignment]  # its names are other ones


def _detect() -> str:
    for variable, name in _CLUSTERS:
        if os.environ.get(variable, "1").isdigit() and int(os.environ.get(variable, "1")) > 1:
            return name
    if len([h for h in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]) > 1:
        return "Cloud TPU"
    if int(os.environ.get("MEGASCALE_NUM_SLICES", "1") or 1) > 1:
        return "Cloud TPU slices"
    return ""


def _local_gpus() -> list[int] | None:
    """This process's share of the host's GPUs; None leaves the choice to JAX (TPU, CPU)."""
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):  # JAX reads it itself
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = (
        glob.glob("/dev/nvidia[0-9]*") if visible is None else [v for v in visible.split(",") if v.strip()]
    )
    count = len(found)
    if not count:
        return None
    here, rank = _local_processes()
    if count % here:
        raise LaunchError(
            f"{count} GPUs cannot be divided among {here} processes on this host",
            where="init_distributed",
            fix="local_device_ids=[...] for each process",
        )
    share = count // here
    return list(range(rank * share, (rank + 1) * share))


def _local_processes() -> tuple[int, int]:
    environment = os.environ
    if "SHARDTRAIN_LOCAL_SIZE" in environment:  # set by `shardtrain launch`
        return int(environment["SHARDTRAIN_LOCAL_SIZE"]), int(environment["SHARDTRAIN_LOCAL_RANK"])
    if "SLURM_LOCALID" in environment:
        tasks = re.match(
            r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1"))
        )
        return int(tasks.group()) if tasks else 1, int(environment["SLURM_LOCALID"])
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]), int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])
    return 1, 0


def _say(line: str) -> str:
    log.info("distributed: %s", line)
    return line
