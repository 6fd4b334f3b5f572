"""What is to run on a cluster, whatever its scheduler, and the profiles that keep the parts that stay the same."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shlex
import tomllib
from collections.abc import Mapping
from typing import Any

from shardtrain.errors import LaunchError, suggestion

PROFILES = "launch.toml"


@dataclasses.dataclass(frozen=True)
class Job:
    """One job. All of it is data: nothing here is read by a shell but `setup`, which is one's own.

    `hosts` x `processes_per_host` processes of `devices_per_process` accelerators. `accelerator`: as the scheduler
    calls it. `setup`: shell lines before the command. `mounts`: in the scheduler's own spelling. `secrets`: variable ->
    reference, never a value. `flags`: raw ones for the scheduler or its client. `grace`: seconds between the warning
    and the kill. `mtls`: "on" has the processes show each other a certificate of this job (`certificates.py`; slurm and
    jobset), "off" trusts the network. `where`: cluster, zone, namespace: whatever the kind asks for (see each).
    """

    command: tuple[str, ...]
    name: str = "shardtrain"
    hosts: int = 1
    processes_per_host: int = 1
    devices_per_process: int = 1
    accelerator: str = ""
    partition: str = ""
    account: str = ""
    time: str = ""
    image: str = ""
    mounts: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    where: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_restarts: int = 3
    grace: int = 90
    port: int = 8476
    mtls: str = "on"

    def __post_init__(self) -> None:
        for name in ("hosts", "processes_per_host", "devices_per_process", "grace", "port"):
            if getattr(self, name) < 1:
                raise LaunchError(f"{getattr(self, name)}", where=_flag(name), fix="1 or more")
        if self.mtls not in ("on", "off"):
            raise LaunchError(f"'{self.mtls}'", where="--mtls", fix="on, or off on a network of your own")
        if self.max_restarts < 0:
            raise LaunchError(f"{self.max_restarts}", where="--max-restarts", fix="0 or more")
        if not self.name:
            raise LaunchError("is empty", where="--name", fix="--name shardtrain")
        for variable in (*self.environment, *self.secrets):
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
                raise LaunchError(
                    f"'{variable}' is no name of a variable", where="environment", fix="letters, digits, _"
                )
        for variable, reference in self.secrets.items():
            if not re.fullmatch(r"(env|secret):\S+", reference):  # the value itself must not be said
                raise LaunchError(
                    "is no reference",
                    where=f"secrets.{variable}",
                    fix=f'"env:{variable}", or "secret:NAME/KEY" on Kubernetes',
                )
        if both := sorted({*self.environment} & {*self.secrets}):
            raise LaunchError(f"{both[0]} is in both", where="environment, secrets", fix="one of them")
        for text in (self.name, *self.command, *self.mounts, *self.environment.values()):
            if "\0" in text:
                raise LaunchError(
                    "a NUL character", where=repr(text), fix="no program takes one in an argument"
                )

    @property
    def processes(self) -> int:
        return self.hosts * self.processes_per_host

    @property
    def devices(self) -> int:
        return self.processes * self.devices_per_process


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def exported(job: Job, **more: str) -> list[str]:
    """Shell lines that set the job's variables, each value quoted; a secret is taken from where it is referred to."""
    lines = [f"export {k}={shlex.quote(v)}" for k, v in {**job.environment, **more}.items()]
    for variable, reference in job.secrets.items():
        kind, _, name = reference.partition(":")
        if kind != "env" or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise LaunchError(
                f"'{reference}' is not known here", where=f"secrets.{variable}", fix='"env:NAME"'
            )
        lines.append(
            f'export {variable}="${{{name}:?the secret {variable} is taken from {name}, which is not set}}"'
        )
    return lines


def read_profile(name: str, file: str | os.PathLike[str] = PROFILES) -> dict[str, Any]:
    """The fields of a named profile: a table of a TOML file.

    Raises:
        LaunchError: no such file or profile, or a field that is unknown or of another type.
    """
    path = pathlib.Path(file)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(
            f"cannot be read: {error.strerror}", where=str(path), fix="--profiles FILE, or no --profile"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LaunchError(
            f"is no TOML: {error}", where=str(path), fix="[NAME], then lines of field = value"
        ) from error
    if not isinstance(tables.get(name), dict):
        names = [n for n, table in tables.items() if isinstance(table, dict)]
        fix = suggestion(name, names, f"add [{name}]") if names else f"add [{name}]"
        raise LaunchError(f"no profile '{name}'", where=str(path), fix=fix)
    known = {f.name: f for f in dataclasses.fields(Job) if f.name != "command"}
    found = {}
    for key, value in tables[name].items():
        field = key.replace("-", "_")
        if field not in known:
            raise LaunchError(
                f"no field '{key}'", where=f"{path} [{name}]", fix=suggestion(field, known, "--help")
            )
        found[field] = _typed(value, str(known[field].type), f"{path} [{name}] {key}")
    return found


def _typed(value: Any, kind: str, where: str) -> Any:
    if kind == "int" and type(value) is int:
        return value
    if kind == "str" and isinstance(value, str):
        return value
    if kind.startswith("tuple") and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if (
        kind.startswith("Mapping")
        and isinstance(value, dict)
        and all(isinstance(v, str) for v in value.values())
    ):
        return dict(value)
    words = {"int": "a number", "str": "a text", "tuple[str, ...]": "a list of texts"}
    raise LaunchError(f"a {type(value).__name__}", where=where, fix=words.get(kind, "a table of texts"))
