"""A SLURM cluster of two nodes on this machine (Debian's slurm-wlm and munge, as root): submitted, requeued, cancelled."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import shardtrain as st

NEEDS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
MISSING = [name for name in NEEDS if shutil.which(name, path=f"{os.environ.get('PATH')}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"not here, or not root: {MISSING}"),
]
NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve everywhere

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=30
SchedulerParameters=batch_sched_delay=0,requeue_delay=1
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.2 Port={ports[2]} CPUs=8
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment variables with which SLURM's commands speak to it."""
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    (folder / "state").mkdir()
    conf = CONF.format(folder=folder, host=socket.gethostname(), ports=free_ports(3))
    (folder / "slurm.conf").write_text(conf)
    path = f"{os.environ['PATH']}:/usr/sbin"
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    env |= {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    subprocess.run(["mungekey", "--create", f"--keyfile={folder}/key"], check=True, env=env)
    (folder / "key").chmod(0o400)
    names = ("socket", "pid", "log", "seed")
    files = [f"--{n}{'-file' if n != 'socket' else ''}={folder}/munge.{n}" for n in names]
    daemons = [["munged", "--foreground", "--force", f"--key-file={folder}/key", *files], ["slurmctld", "-D"]]
    daemons += [["slurmd", "-D", "-N", node] for node in NODES]
    running = []
    for command in daemons:
        log = (folder / f"out-{len(running)}").open("wb")
        running.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        time.sleep(1.0)
    try:
        yield env
    finally:
        for daemon in reversed(running):
            daemon.terminate()
        for daemon in running:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def until(condition, seconds=240.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.5)
    return condition()


class Submitted:
    """A job of two nodes, one process of two simulated devices on each."""

    def __init__(self, env, folder, name, *train, options=()):
        self.env = {**env, "READS": str(folder / "reads")}
        self.output = folder / name
        self.out = folder / f"{name}.out"
        command = [sys.executable, "-m", "shardtrain", "launch", "slurm", "--json", "--hosts", "2"]
        command += [
            "--devices-per-process",
            "2",
            "--set",
            "gpus=none",
            "--set",
            f"output={self.out}",
            *options,
        ]
        command += ["--", "train", f"{folder / 'my.py'}:tiny", "--output", str(self.output), *train]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        self.job = json.loads(done.stdout)["submitted"].removeprefix("slurm:")

    def ask(self, *command):
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60).stdout

    def shown(self):
        return self.ask("scontrol", "show", "job", self.job)

    def state(self):
        return self.shown().partition("JobState=")[2].partition(" ")[0]

    def ended(self):
        return self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "")

    def rows(self):
        file = self.output / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_runs_on_two_nodes(cluster, folder, launch):
    """Names of the job are data to a real sbatch, and the curve is that of one process. The fault in mind: quotes
    in a name."""
    name = """a "b" $(touch made) 'c' \\ #d"""
    done = Submitted(cluster, folder, "slurm", options=["--name", name])
    assert until(done.ended), done.shown()
    assert done.state() == "COMPLETED", done.shown() + (done.out.read_text() if done.out.exists() else "")
    assert f"JobName={name}" in done.shown() and "NodeList=127.0.0.[1-2]" in done.shown()
    one = launch("one-for-slurm")
    assert [r["ids"] for r in done.rows()] == one.curve("ids")
    assert [r["loss"] for r in done.rows()] == pytest.approx(one.curve(), rel=1e-6)
    record = json.loads((done.output / "launch.json").read_text())
    assert (record["kind"], record["job"]) == ("slurm", done.job)


def test_cancelled_requeued_resumed(cluster, folder):
    """SIGTERM from the scheduler: saved, requeued by its own script, gone on with; then stopped for good.

    The fault in mind: rows that both attempts took, or neither.
    """
    slow = ["--env", "SHARDTRAIN_INJECT=slow@step=1:seconds=1:attempt=all"]
    done = Submitted(cluster, folder, "again", "--steps", "60", options=slow)
    assert until(lambda: len(done.rows()) >= 2), done.shown()
    done.ask("scancel", "--signal=TERM", done.job)
    assert until(lambda: "Restarts=1" in done.shown()), done.shown()
    assert until(lambda: done.state() == "PENDING"), done.shown()
    time.sleep(3)  # a start in the second of the requeue finds its credential revoked
    done.ask("scontrol", "update", f"JobId={done.job}", "StartTime=now")  # SLURM itself waits two minutes
    saved = max(int(p.name) for p in (done.output / "checkpoints").iterdir() if p.name.isdigit())
    assert until(lambda: len(done.rows()) > saved + 1), done.shown() + done.out.read_text()
    assert [r["step"] for r in done.rows()] == list(range(1, len(done.rows()) + 1))
    stopped = [sys.executable, "-m", "shardtrain", "stop", str(done.output)]
    assert subprocess.run(stopped, env=done.env, timeout=60).returncode == 0
    assert until(done.ended), done.shown()
    assert done.state() == "CANCELLED" and "Restarts=1" in done.shown()
    loader = st.ArrayLoader({"id": np.arange(200, dtype=np.int32)}, 16, seed=1)
    batches = itertools.islice(loader.starting_at(0), len(done.rows()))
    groups = 4  # whose mean the metric is
    assert [r["ids"] for r in done.rows()] == [b["id"].sum() / groups for b in batches]
