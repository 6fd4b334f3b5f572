"""Run a command in several processes, here or on a cluster, and start it again when one of them fails.

  shardtrain launch local --processes 2 -- train configs/gpt.py:tiny
  shardtrain launch local --processes 4 --devices-per-process 2 -- python script.py ARGS
  shardtrain launch slurm --hosts 16 --devices-per-process 8 --partition gpu --dry-run -- train configs/gpt.py:xl
  shardtrain launch jobset --profile pod --set provider=gke-tpu --set topology=4x4 -- train configs/gpt.py:xl

The processes find each other: `train` joins them by itself, a script calls `st.init_distributed()` first. The first
failure ends the others and is named; after exit codes 3 and 75 and after signals all start again from the last
checkpoint. `local` divides simulated devices (`--devices cpu:8`) and GPUs among its processes. The others render what
they run, which --dry-run prints, and run the client that is installed: sbatch, kubectl, gcloud, pcluster, sky.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from shardtrain.cli import COMMANDS, shell
from shardtrain.errors import ConfigError, suggestion
from shardtrain.launch import engines, local
from shardtrain.launch.job import PROFILES, Job, read_profile
from shardtrain.train.inject import parse
from shardtrain.watch import parse_silence

STARTS_ANOTHER = True
KINDS = ("local", *engines.ENGINES)
_NUMBERS = ("hosts", "devices_per_process", "max_restarts", "grace")  # of both
_LOCAL = ("processes", "elastic", "output_logs", "host", "inject", "silence", "host_index", "coordinator")
_BOTH = ("mtls",)
_TEXTS = ("name", "accelerator", "partition", "account", "time", "image")
_LISTS = {"mount": "mounts", "setup": "setup", "flag": "flags"}
_TABLES = {"env": "environment", "secret": "secrets", "set": "where"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=" | ".join(KINDS))
    add = parser.add_argument
    add("--dry-run", action="store_true", help="print what would run, and stop")
    add("--hosts", type=int, metavar="N", help="default 1")
    add("--devices-per-process", type=int, metavar="K", help="accelerators, or simulated devices, of each")
    add("--max-restarts", type=int, metavar="R", help="after failures, not preemptions (default 3)")
    add(
        "--grace",
        type=int,
        metavar="SECONDS",
        help="to save after SIGTERM (default 60 here, 90 on a cluster)",
    )
    add(
        "--mtls",
        metavar="on|off|FOLDER",
        help="certificates for the coordinator: slurm and jobset make them (on, the default); local takes a FOLDER",
    )
    add = parser.add_argument_group("local").add_argument
    add("--processes", type=int, metavar="N", help="on this machine (default 1)")
    add("--elastic", action="store_true", default=None, help="restarts used up: go on with fewer processes")
    add("--output-logs", type=pathlib.Path, metavar="DIR", help="also write DIR/process-N.log")
    add("--host", metavar="ADDRESS", help="where the coordinator listens (default 127.0.0.1)")
    add(
        "--inject",
        metavar="FAULT",
        help="such as kill@step=12:process=1; also stop, term, hang, slow, nan, corrupt, disk-full",
    )
    add(
        "--silence",
        metavar="PHASE=SECONDS",
        help="data=60,alive=30: longer counts as stuck; learnt by default",
    )
    add("--host-index", type=int, metavar="I", help="which of --hosts this is")
    add("--coordinator", metavar="HOST:PORT", help="the first host, where there are several")
    add = parser.add_argument_group("clusters").add_argument
    add("--profile", metavar="NAME", help="a table of --profiles; flags win")
    add("--profiles", default=PROFILES, metavar="FILE", help=f"default {PROFILES}")
    add("--processes-per-host", type=int, metavar="P", help="default 1")
    add("--name", metavar="NAME", help="of the job (default shardtrain)")
    add("--accelerator", metavar="KIND", help="as the cluster calls it")
    for name in ("partition", "account", "time", "image"):
        add(f"--{name}", metavar=name.upper())
    add(
        "--mount",
        action="append",
        metavar="MOUNT",
        help="in the cluster's own spelling; may be repeated, as all below",
    )
    add("--setup", action="append", metavar="LINE", help="a shell line before the command")
    add("--flag", action="append", metavar="FLAG", help="a raw flag of the client: --flag=--exclusive")
    add("--env", action="append", metavar="NAME=VALUE")
    add("--secret", action="append", metavar="NAME=REF", help="env:NAME, or secret:NAME/KEY on Kubernetes")
    add(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="what this kind asks for besides: zone, topology, ...",
    )


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    other = (
        (*_TEXTS, *_LISTS, *_TABLES, "profile", "processes_per_host") if options.kind == "local" else _LOCAL
    )
    for name in other:
        if getattr(options, name) is not None:
            fix = f"shardtrain launch {'KIND' if options.kind == 'local' else 'local'} has it"
            raise ConfigError(f"not for {options.kind}", where=f"--{name.replace('_', '-')}", fix=fix)
    return _local(options) if options.kind == "local" else _cluster(options)


def _local(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    parse(options.inject or "")
    parse_silence(options.silence or "")
    given = {n: getattr(options, n) for n in (*_NUMBERS, *_BOTH, *_LOCAL) if getattr(options, n) is not None}
    asked = local.Local(
        command=command_of(options.other, sys.executable),
        processes=given.pop("processes", 1),
        logs=given.pop("output_logs", None),
        **given,
    )
    if not options.dry_run:
        found = local.launch(asked, shell.say, quiet=options.json)
        return found["exit"], found
    starts = local.starts(asked, asked.processes, 0, local.free_port(asked.host))
    for start in () if options.json else starts:
        print(shlex.join([f"{k}={v}" for k, v in start.environment.items()] + list(start.command)))
    return shell.DONE, {
        "kind": "local",
        "processes": asked.processes,
        "starts": [{"environment": dict(s.environment), "command": list(s.command)} for s in starts],
    }


def _cluster(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    fields = read_profile(options.profile, options.profiles) if options.profile else {}
    for name in (*_NUMBERS, *_BOTH, *_TEXTS, "processes_per_host"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    for flag, field in _LISTS.items():
        fields[field] = (*fields.get(field, ()), *(getattr(options, flag) or ()))
    for flag, field in _TABLES.items():
        fields[field] = {**fields.get(field, {}), **_pairs(flag, getattr(options, flag) or ())}
    engines.check_settings(options.kind, fields["where"])
    here = sys.executable if options.kind == "slurm" and not fields.get("image") else "python3"
    job = Job(command=command_of(options.other, fields["where"].get("python", here)), **fields)
    rendered = engines.rendered(options.kind, job)
    summary = {"kind": options.kind, "processes": job.processes, "devices": job.devices}
    if options.dry_run:
        for command, text in () if options.json else rendered:
            print(engines.shown(command, text))
        return shell.DONE, {**summary, "runs": [{"command": c, "text": t} for c, t in rendered]}
    found = engines.submit(options.kind, job, shell.say)
    name = engines.name_of(found)
    if not options.json:
        print(name)
    shell.say(f"launch: handed over; shardtrain status {shlex.quote(name)}")
    return shell.DONE, {**summary, "submitted": name}


def _pairs(flag: str, words: Sequence[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise ConfigError(f"'{name}' has no value", where=f"--{flag}", fix=f"--{flag} NAME=VALUE")
        found[name] = value
    return found


def command_of(words: Sequence[str], python: str) -> tuple[str, ...]:
    """What each process runs: a command of ours, or a Python script.

    Raises:
        ConfigError: neither.
    """
    known = [name for name in COMMANDS if name not in ("launch", "status", "logs", "stop")]
    if not words:
        raise ConfigError(
            "no command to run", where="launch", fix="end with `-- train CONFIG` or `-- python FILE`"
        )
    if words[0] in known:
        return (python, "-m", "shardtrain", *words)
    if words[0] == "python" and len(words) > 1:
        return (python, *words[1:])
    raise ConfigError(
        f"'{words[0]}' is no command to run" if words[0] != "python" else "python without a script",
        where="launch",
        fix=suggestion(words[0], [*known, "python"], "`-- train CONFIG`, `-- python FILE`"),
    )
