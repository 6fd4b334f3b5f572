"""Programs for hardware that is not here: the real compilers, in worker processes, cached by content."""

from __future__ import annotations

import ctypes.util
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from shardtrain.errors import CompileError, ConfigError
from shardtrain.mesh.build import device_grid
from shardtrain.mesh.target import Target
from shardtrain.plan.options import heard, options_for
from shardtrain.tree import bytes_text

FORMAT = 1  # of the cache
_COMPILER = {  # platform -> module that must be there, distribution whose version counts, extra
    "tpu": ("libtpu", "libtpu", "aot-tpu"),
    "cuda": ("jax_plugins.xla_cuda13", "jax-cuda13-plugin", "aot-gpu"),
    "cpu": ("jaxlib", "jaxlib", ""),
}
_ROOT = pathlib.Path(__file__).resolve().parents[2]  # the worker imports this very package


@dataclasses.dataclass(frozen=True)
class Program:
    """What a target's compiler made. `memory`: see `plan.compiled.Memory`. `stderr`: what the compiler said. `fast`: at a
    level that schedules nothing."""

    target: Target
    text: str
    memory: Mapping[str, int]
    stderr: str
    cpu_seconds: float
    cached: bool
    source: str
    fast: bool = False

    def as_text(self) -> str:
        """Optimized HLO."""
        return self.text


def mesh_for(target: Target, shape: Mapping[str, int]) -> Any:
    """The mesh to lower a program on. On GPUs some kernels ask for devices when they are lowered: stand-ins.

    Raises:
        ConfigError: the target's compiler is not installed.
    """
    abstract = target.mesh(dcn=None, **shape)
    compiler_version(target)
    if target.platform != "cuda":
        return abstract
    from shardtrain.plan.topology import devices

    return Mesh(
        device_grid(abstract.shape, devices(target)), abstract.axis_names, axis_types=abstract.axis_types
    )


def compile_for(
    module: Any,
    target: Target,
    mesh: Mapping[str, int],
    options: Mapping[str, Any] | None = None,
    *,
    timeout: float = 1800,
) -> Program:
    """Compile a lowered module for devices that need not exist.

    Args:
        module: `lowered.compiler_ir("stablehlo")`, partitioned over `mesh`.
        mesh: axis sizes in mesh order.
        options: XLA compiler options of that platform, over those of `plan.options`.
        timeout: seconds of wall time.

    Raises:
        ConfigError: the target's compiler is not installed; the message names the extra.
        CompileError: the compiler refused, ran out of the device's memory, died or took too long.
    """
    version = compiler_version(target)
    wanted = options_for(target.platform, options, chip=target.family)
    buffer = io.BytesIO()
    module.operation.write_bytecode(buffer)
    request = {"target": target.name, "mesh": dict(mesh), "options": wanted}
    identity = json.dumps([FORMAT, request, version, heard()], sort_keys=True).encode()
    key = hashlib.sha256(identity + b"\0" + buffer.getvalue()).hexdigest()
    place = cache_folder() / key[:40]
    cached = (place / "result.json").is_file()
    if not cached:
        _compile(buffer.getvalue(), request, place, target, timeout)
    result = json.loads((place / "result.json").read_text())
    source = f"counted in the program compiled by {version} for {target}"
    if options:
        source += f" with {' '.join(f'{n}={v}' for n, v in sorted(options.items()))}"
    return Program(
        target=target,
        text=gzip.decompress((place / "program.txt.gz").read_bytes()).decode(),
        memory=result["memory"],
        stderr=(place / "stderr.txt").read_text(errors="replace"),
        cpu_seconds=result["cpu_seconds"],
        cached=cached,
        source=source,
        fast=wanted.get("optimization_level") == "O0",
    )


def compiler_version(target: Target) -> str:
    """`libtpu 0.0.50.1, jaxlib 0.12.0`.

    Raises:
        ConfigError: the compiler of this target is not installed.
    """
    module, distribution, extra = _COMPILER[target.platform]
    parent = module.split(".", maxsplit=1)[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"its compiler ({distribution}) is not installed",
            where=f"target {target}",
            fix=f"pip install 'shardtrain[{extra}]' (Linux), or --target cpu:{target.size}",
        )
    if target.platform == "cuda" and not _has_cudnn():
        raise ConfigError(
            "cuDNN is not installed; fused attention is chosen when a program is lowered",
            where=f"target {target}",
            fix="pip install 'shardtrain[aot-gpu]' (Linux)",
        )
    jaxlib = f"jaxlib {importlib.metadata.version('jaxlib')}"
    if distribution == "jaxlib":
        return jaxlib
    return f"{distribution} {importlib.metadata.version(distribution)}, {jaxlib}"


def _has_cudnn() -> bool:
    packaged = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.cudnn")
    return bool(packaged) or ctypes.util.find_library("cudnn") is not None


def cache_folder() -> pathlib.Path:
    """Where compiled programs are kept: `SHARDTRAIN_CACHE`, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("SHARDTRAIN_CACHE") or pathlib.Path(home) / "shardtrain") / "aot"


def _compile(
    module: bytes, request: Mapping[str, Any], place: pathlib.Path, target: Target, timeout: float
) -> None:
    with tempfile.TemporaryDirectory(prefix="shardtrain-aot-") as name:
        folder = pathlib.Path(name)
        (folder / "module.mlirbc").write_bytes(module)
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", "shardtrain.plan.worker", name]
        with (folder / "stderr.txt").open("wb") as stderr:
            try:
                # Arguments are our own and a folder that we made; no shell.
                done = subprocess.run(  # noqa: S603
                    command, env=_environment(), stdout=stderr, stderr=stderr, timeout=timeout, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise CompileError(
                    f"no program after {timeout:.0f} s",
                    where=f"target {target}",
                    fix="a smaller model, scanned layers, or options={'optimization_level': 'O0'}",
                ) from error
        said = (folder / "stderr.txt").read_text(errors="replace")
        if not (folder / "result.json").is_file():
            lines = [line for line in said.splitlines() if line.strip()]
            raise CompileError(
                f"the compiler's process ended with {done.returncode}",
                where=f"target {target}",
                why=" | ".join(lines[-3:])[:600],
                fix="more memory on this machine"
                if done.returncode == -9
                else "another layout, or report it",
            )
        result = json.loads((folder / "result.json").read_text())
        if "error" in result:
            raise _refused(result["error"], target)
        _keep(folder, place)


def _refused(error: Mapping[str, Any], target: Target) -> CompileError:
    if error["kind"] == "memory":
        return CompileError(
            f"does not fit: temporaries take {bytes_text(error['needed'])}, "
            f"the device has {bytes_text(error['available'])}",
            where=f"target {target}",
            why="said by the target's compiler, after it recomputed what it could",
            fix="more microbatches, remat full, or more of the mesh on fsdp or tensor",
        )
    return CompileError(
        error["message"].splitlines()[0][:400] if error["message"] else error["kind"],
        where=f"target {target}",
        why=error["kind"],
        fix="another layout or other compiler options",
    )


def _keep(folder: pathlib.Path, place: pathlib.Path) -> None:
    """Into the cache, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    staged = pathlib.Path(tempfile.mkdtemp(dir=place.parent, prefix=".new-"))
    text = (folder / "program.txt").read_bytes()
    (staged / "program.txt.gz").write_bytes(gzip.compress(text, 5, mtime=0))
    for name in ("stderr.txt", "result.json"):
        shutil.copyfile(folder / name, staged / name)
    try:
        staged.rename(place)
    except OSError:  # another process was first
        shutil.rmtree(staged)


def _environment() -> dict[str, str]:
    """Of a worker: no devices of this machine, and compilers that do not look for any."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two workers may compile at once
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_STDERR_LOG_LEVEL": "1",
        "TF_CPP_MIN_LOG_LEVEL": "1",  # warnings: among them replication that nobody asked for
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")])),
    }
