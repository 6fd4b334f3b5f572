"""What is rendered for clusters, and what their clients are given; the clients are fakes that note it."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from shardtrain.cli import main
from shardtrain.errors import LaunchError, RunError
from shardtrain.launch import aws, engines, jobset, sky, slurm, tpu_vm
from shardtrain.launch.job import Job, read_profile

NASTY = [
    "a b",
    "it's",
    'say "no"',
    "$(touch made)",
    "`touch made`",
    "two\nlines",
    "; touch made",
    "a\\b",
    "*",
    "-x",
]
COMMAND = ("python", "-m", "shardtrain", "train", *NASTY)
SCHEMA = json.loads(pathlib.Path(__file__).with_name("jobset_schema.json").read_text())["schema"]

FAKE = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], sys.stdin.read()]) + "\\n")
for words, answer, code in json.load(open({answers!r})):
    if words in " ".join(sys.argv):
        print(answer) if not code else print(answer, file=sys.stderr)
        sys.exit(code)
"""


@pytest.fixture
def client(tmp_path, monkeypatch):
    """`client("sbatch", ("words of the call", "answer", code), ...)`; `client.calls()`: name, arguments, stdin."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log, answers = tmp_path / "calls", tmp_path / "answers"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def make(name, *replies):
        answers.write_text(json.dumps(replies))
        file = folder / name
        file.write_text(FAKE.format(python=sys.executable, log=str(log), answers=str(answers)))
        file.chmod(0o755)

    make.calls = lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    make.change = lambda *replies: answers.write_text(json.dumps(replies))
    return make


def run_by_shell(text, tmp_path, **fakes):
    """What a shell makes of a rendered script: the words that reached the command, and the environment."""
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    note = f"import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open({str(folder / 'got')!r}, 'w'))"
    for name, body in {"python": f'exec {sys.executable} -c "{note}" "$@"', **fakes}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    env = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "n",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
    }
    done = subprocess.run(
        ["bash", "-c", text], cwd=folder, env={**env, "TOKEN": "hidden"}, capture_output=True, text=True
    )
    assert not (folder / "made").exists()
    return (*json.loads((folder / "got").read_text()), done)


def test_slurm_words_are_data(tmp_path):
    """Through bash and a fake srun, every word and value arrives as it was. Failed once without shlex.join."""
    job = Job(
        COMMAND, name="$(touch made)", environment={"TEXT": NASTY[3] + "\n'"}, secrets={"KEY": "env:TOKEN"}
    )
    fakes = {"srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"', "scontrol": "echo first"}
    words, env, done = run_by_shell(slurm.script(job), tmp_path, **fakes)
    assert done.returncode == 0, done.stderr
    assert words == list(COMMAND[1:]) and env["TEXT"] == NASTY[3] + "\n'" and env["KEY"] == "hidden"
    assert env["JAX_COORDINATOR_ADDRESS"] == "first:20007" and env["JAX_NUM_PROCESSES"] == "2"
    assert "hidden" not in slurm.script(job)


@pytest.mark.parametrize(
    ("code", "count", "again"), [(3, 0, 1), (75, 2, 1), (137, 0, 1), (3, 3, 0), (2, 0, 0), (0, 0, 0)]
)
def test_slurm_requeues(tmp_path, code, count, again):
    """After failures and preemptions, at most three times, never after wrong input. Failed once with 2 requeued."""
    script = f"export SLURM_RESTART_COUNT={count}\n" + slurm.script(Job(("python", "x")))
    fakes = {
        "srun": f"touch got; echo '[[], {{}}]' > {tmp_path}/run/got; exit {code}",
        "scontrol": f'[ "$1" = requeue ] && echo "$2" >> {tmp_path}/again; echo first',
    }
    *_, done = run_by_shell(script, tmp_path, **fakes)
    assert done.returncode == code
    assert (tmp_path / "again").exists() == bool(again)


def test_slurm_set_up_that_fails(tmp_path):
    """Ends the job before anything is started. Failed once: the command ran without its modules."""
    script = slurm.script(Job(("python", "x"), setup=("false",)))
    done = subprocess.run(
        ["bash", "-c", f"srun() {{ touch {tmp_path}/ran; }}\n{script}"], capture_output=True
    )
    assert done.returncode == 1 and not (tmp_path / "ran").exists()


def test_slurm_script_says_what_it_asks_for():
    """The fault in mind: GPUs per process in the place of GPUs per host."""
    job = Job(
        ("x",),
        hosts=16,
        processes_per_host=4,
        devices_per_process=2,
        partition="gpu",
        account="a",
        time="1:00:00",
    )
    lines = slurm.script(job).splitlines()
    for option in (
        "--nodes=16", "--ntasks=64", "--ntasks-per-node=4", "--gres=gpu:8", "--requeue", "--signal=TERM@90",
        "--partition=gpu", "--account=a", "--time=1:00:00",
    ):  # fmt: skip
        assert f"#SBATCH {option}" in lines
    assert any(line.startswith("srun --kill-on-bad-exit=1") for line in lines)
    assert "export SHARDTRAIN_TOTAL_DEVICES=128" in lines
    broken = Job(("x",), name="two\n#SBATCH --uid=root")
    assert slurm.command(broken)[-1] == "--job-name=two\n#SBATCH --uid=root"
    assert not any("uid" in line for line in slurm.script(broken).splitlines())


@pytest.mark.parametrize("each", [1, 2, 4, 8])
def test_sixteen_hosts_of_eight_gpus(each, monkeypatch):
    """Every rank of the rendered job takes its own GPUs: 128 in all. Failed once with all GPUs for every process."""
    import jax

    from shardtrain.mesh import distributed

    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: joined.append((a, k)))
    monkeypatch.setattr(distributed, "_until_it_listens", lambda *_: None)
    monkeypatch.setattr(jax, "device_count", lambda *_: total)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    job = Job(("x",), hosts=16, processes_per_host=each, devices_per_process=8 // each)
    exports = dict(
        shlex.split(line)[1].split("=", 1)
        for line in slurm.script(job).splitlines()
        if "TOTAL_DEVICES" in line
    )
    taken, total = [], 128
    for host in range(16):
        for local in range(each):
            rank = {
                "JAX_COORDINATOR_ADDRESS": "first:20007", "JAX_NUM_PROCESSES": str(job.processes),
                "SLURM_PROCID": str(host * each + local), "SLURM_LOCALID": str(local),
                "SLURM_TASKS_PER_NODE": f"{each}(x16)", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", **exports,
            }  # fmt: skip
            with monkeypatch.context() as patch:
                for name, value in rank.items():
                    patch.setenv(name, value)
                distributed.init_distributed()
                taken += [(host, i) for i in joined[-1][1]["local_device_ids"]]
    assert len(taken) == len(set(taken)) == 128
    assert [a[2] for a, _ in joined] == list(range(16 * each))
    total = 16  # one GPU a host was found: refused before anything is compiled
    with monkeypatch.context() as patch, pytest.raises(LaunchError, match="16 devices"):
        for name, value in rank.items():
            patch.setenv(name, value)
        distributed.init_distributed()


def violations(value, schema, where="$"):
    """What a strict reading of the published schema has against a value: unknown names too."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, int | str) else [f"{where}: {value!r}"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = schema.get("type")
    if kind in kinds and (
        not isinstance(value, kinds[kind]) or (kind == "integer" and isinstance(value, bool))
    ):
        return [f"{where}: {type(value).__name__} is no {kind}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r}")
    if isinstance(value, int) and value < schema.get("minimum", value):
        found.append(f"{where}: {value}")
    if isinstance(value, dict):
        found += [f"{where}: no {name}" for name in schema.get("required", ()) if name not in value]
        more = schema.get("additionalProperties")
        for name, part in value.items():
            known = schema.get("properties", {}).get(name, more)
            if known is None and schema.get("properties") is not None:
                found.append(f"{where}: unknown {name}")
            elif known:
                found += violations(part, known, f"{where}.{name}")
    if isinstance(value, list):
        for index, part in enumerate(value):
            found += violations(part, schema.get("items", {}), f"{where}[{index}]")
    return found


PODS = {
    "gke": {"accelerator": "nvidia-h100-80gb", "where": {"provider": "gke", "namespace": "team"}},
    "eks": {"accelerator": "p5.48xlarge", "where": {"provider": "eks"}},
    "gke-tpu": {
        "accelerator": "tpu-v5-lite-podslice",
        "where": {"provider": "gke-tpu", "topology": "4x8", "slices": "2"},
    },
}


def pod_job(provider, **more):
    return Job(COMMAND, name="gpt", hosts=4, devices_per_process=8, image="r/i:1", **PODS[provider], **more)


@pytest.mark.parametrize("provider", PODS)
def test_jobset_is_valid(provider):
    """Against the published schema, nothing unknown in it. Failed once with `parallelism` a text."""
    made = jobset.manifest(
        pod_job(
            provider,
            mounts=("data:/data",),
            account="trainer",
            secrets={"KEY": "secret:team/key"},
            setup=("true",),
        )
    )
    assert violations(json.loads(json.dumps(made)), SCHEMA) == []


def test_the_check_of_jobsets_finds_faults():
    """One of each kind. The fault in mind: a check that finds nothing."""
    for change in (
        lambda m: m["spec"].update(replicas=1),
        lambda m: m["spec"]["replicatedJobs"][0].pop("name"),
        lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"].update(completions="4"),
        lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Restart"),
        lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][
            0
        ].update(envs=[]),
        lambda m: m["spec"]["replicatedJobs"][0].update(replicas=-1),
    ):
        made = jobset.manifest(pod_job("gke"))
        change(made)
        assert len(violations(made, SCHEMA)) == 1


def test_jobset_pods_find_each_other():
    """By names of the JobSet alone; words and values as they were, also where Kubernetes would read them.

    Failed once: `$(touch made)` in an argument is a reference to a variable there.
    """
    job = pod_job("gke", environment={"TEXT": "$(HOME) 'x'"}, secrets={"KEY": "secret:team/key"})
    spec = jobset.manifest(job)["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
    expand = lambda text: text.replace("$$(", "$(")
    assert [expand(w) for w in container["command"]] == list(COMMAND) and "$(touch" not in container[
        "command"
    ][7].replace("$$(", "")
    assert expand(env["TEXT"]) == "$(HOME) 'x'" and env["KEY"] == {
        "secretKeyRef": {"name": "team", "key": "key"}
    }
    assert env["JAX_COORDINATOR_ADDRESS"] == "gpt-workers-0-0.gpt:8476" and env["JAX_NUM_PROCESSES"] == "4"
    assert env["SHARDTRAIN_TOTAL_DEVICES"] == "32" and env["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3,4,5,6,7"
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (4, 4, 0)
    tpu = jobset.manifest(pod_job("gke-tpu"))["spec"]["replicatedJobs"][0]
    assert tpu["replicas"] == 2 and "JAX_NUM_PROCESSES" not in json.dumps(tpu)  # GKE's own variables say it


def test_jobset_setup_keeps_words(tmp_path):
    """Set-up lines run in a shell, the command after them does not. The fault in mind: words pasted into the script."""
    made = jobset.manifest(pod_job("gke", setup=("export SETUP=done",)))
    words = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0][
        "command"
    ]
    words = [w.replace("$$(", "$(") for w in words]
    got, env, _ = run_by_shell(shlex.join(words), tmp_path)
    assert got == list(COMMAND[1:]) and env["SETUP"] == "done"


def test_tpu_vm(client, monkeypatch, tmp_path):
    """Created where there is none, awaited, copied to, started on all workers; the shell there reads quoted words."""
    client("gcloud", ["describe", "NOT_FOUND: no such resource", 1])
    job = Job(COMMAND, name="t p", hosts=4, devices_per_process=4, accelerator="v5litepod-16",
              where={"zone": "us-west4-a", "copy": "my code", "spot": "true"}, environment={"TEXT": "$(touch made)"})  # fmt: skip
    states = iter(["", "WAITING_FOR_RESOURCES", "ACTIVE"])
    real = tpu_vm._state
    assert real(tpu_vm.commands(job)["describe"][0]) == ""  # not found is no failure
    monkeypatch.setattr(tpu_vm, "_state", lambda _: next(states))
    client.change(["", "", 0])
    found = tpu_vm.submit(job, print, pause=0)
    calls = [arguments for _, arguments, _ in client.calls()[1:]]
    assert [c[2:4] for c in calls] == [["queued-resources", "create"], ["tpu-vm", "scp"], ["tpu-vm", "ssh"]]
    assert "--spot" in calls[0] and calls[0][4] == "t p" and "my code" in calls[1]
    line = calls[2][-1].removeprefix("--command=")
    words, env, done = run_by_shell(line + "\nwait", tmp_path)
    assert words == list(COMMAND[1:]) and env["TEXT"] == "$(touch made)", done.stderr
    assert env["SHARDTRAIN_TOTAL_DEVICES"] == "16"
    assert engines.name_of(found) == "tpu-vm:t p@us-west4-a"


def test_tpu_vm_refused_by_the_cloud(client, monkeypatch):
    """A request that fails ends with its state. The fault in mind: waiting for it for ever."""
    client("gcloud", ["describe", "FAILED", 0])
    with pytest.raises(RunError, match="FAILED"):
        tpu_vm.submit(Job(("x",), accelerator="a", where={"zone": "z"}), print, pause=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not here")
@pytest.mark.parametrize("slices", ["1", "2"])
def test_gcloud_reads_every_flag(slices, tmp_path):
    """The real client, without an account: it parses the whole line before it asks for one. Failed once on --nonsense."""
    where = {"zone": "us-west4-a", "project": "p-1", "copy": "code", "spot": "true", "slices": slices}
    job = Job(COMMAND, name="gpt", hosts=4, devices_per_process=4, accelerator="v5litepod-16", where=where)
    phases = tpu_vm.commands(job)
    commands = [c for phase in phases.values() for c in phase] + [
        f(job) for f in (tpu_vm.status, tpu_vm.logs, tpu_vm.stop)
    ]
    env = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path)}
    for command in commands:
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert "do not currently have an active account" in done.stderr, done.stderr


def test_several_slices():
    """One request for all of them, each slice copied to and started. The fault in mind: only the first."""
    made = tpu_vm.commands(
        Job(("x",), name="n", accelerator="a", where={"zone": "z", "slices": "2", "copy": "c"})
    )
    assert "--node-count=2" in made["create"][0] and "--node-prefix=n" in made["create"][0]
    assert [c[5] for c in made["run"]] == ["n-0", "n-1"] and len(made["copy"]) == 2


def test_sky(client, tmp_path):
    """The task is JSON, so YAML has nothing to guess; secrets go by name. Failed once with a secret's value in it."""
    job = Job(COMMAND, name="s", hosts=2, processes_per_host=2, devices_per_process=4, accelerator="H100",
              environment={"NO": "no", "E": "1e-3"}, secrets={"KEY": "env:KEY"}, setup=("true",), mounts=("/d:s3://b",))  # fmt: skip
    task = sky.task(job)
    assert task["resources"] == {"accelerators": "H100:8"} and task["num_nodes"] == 2
    assert (
        task["envs"]["NO"] == "no"
        and task["secrets"] == {"KEY": None}
        and task["file_mounts"] == {"/d": "s3://b"}
    )
    here = "export SKYPILOT_NUM_NODES=2 SKYPILOT_NODE_RANK=1 SKYPILOT_NODE_IPS=$'10.0.0.1\\n10.0.0.2'\n"
    words, _, done = run_by_shell(here + task["run"], tmp_path)
    cut = words.index("--")
    assert words[cut + 1 :] == list(COMMAND[3:]), done.stderr
    assert (
        words[words.index("--coordinator") + 1] == "10.0.0.1:8476"
        and words[words.index("--host-index") + 1] == "1"
    )
    client("sky", ["", "", 0])
    sky.submit(job)
    ((_, arguments, _),) = client.calls()
    assert arguments[:2] == ["launch", "--yes"] and arguments[arguments.index("--secret") + 1] == "KEY"


def test_aws(client):
    """EKS is a JobSet on its instances; ParallelCluster is SLURM behind one more shell."""
    command, text = aws.rendered(Job(COMMAND, name="e", image="i", accelerator="p5.48xlarge"))
    assert command[0] == "kubectl" and "node.kubernetes.io/instance-type" in text
    client("pcluster", ["sbatch", "12", 0])
    job = Job(COMMAND, name="a\nb", where={"engine": "parallelcluster", "cluster": "c"})
    assert engines.name_of(aws.submit(job)) == "aws:12@c"
    ((_, arguments, stdin),) = client.calls()
    assert arguments[:2] == ["ssh", "--cluster-name=c"] and stdin == slurm.script(job)
    assert shlex.split(arguments[2]) == slurm.command(job) and "--job-name=a\nb" in slurm.command(job)


def test_handed_over_and_asked_about(client, capfd):
    """Submitted by the shell, then its status and its end. The fault in mind: the job's number lost."""
    client("sbatch", ["", "123;cluster", 0])
    assert main(["launch", "slurm", "--hosts", "2", "--flag=--exclusive", "--", "train", "c.py:f"]) == 0
    assert capfd.readouterr().out.strip() == "slurm:123"
    name, arguments, stdin = client.calls()[0]
    assert (name, arguments) == ("sbatch", ["--parsable"]) and "#SBATCH --exclusive" in stdin
    client("squeue", ["--jobs 123", "RUNNING None n1 0:05", 0])
    assert main(["status", "slurm:123"]) == 0 and "RUNNING" in capfd.readouterr().out
    client("scancel", ["123", "", 0])
    assert main(["stop", "slurm:123"]) == 0
    assert [c[:2] for c in client.calls()[1:]] == [
        ["squeue", ["--jobs", "123", "--noheader", "--format=%T %r %N %M"]],
        ["scancel", ["123"]],
    ]


def test_a_client_that_fails(client, capfd):
    """Its own words and exit code 3. The fault in mind: taken for done."""
    client("sbatch", ["", "sbatch: error: invalid partition", 1])
    assert main(["launch", "slurm", "--", "train", "c.py:f"]) == 3
    assert "invalid partition" in capfd.readouterr().err


PROFILE = """
[big]
hosts = 16
devices-per-process = 8
partition = "gpu"
setup = ["module load cuda"]
[big.environment]
NCCL_DEBUG = "INFO"
[big.secrets]
WANDB_API_KEY = "env:TOKEN"
[open]
secrets = { KEY = "hunter2" }
[wrong]
hosts = "16"
[unknown]
partitions = "gpu"
"""


def test_profiles(tmp_path, monkeypatch, capfd):
    """A profile with flags over it; a secret by name only. Failed once with flags replacing its environment."""
    (tmp_path / "launch.toml").write_text(PROFILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKEN", "hunter2")
    flags = ["--profile", "big", "--partition", "other", "--env", "MORE=1", "--setup", "true", "--dry-run"]
    assert main(["launch", "slurm", *flags, "--", "train", "c.py:f"]) == 0
    out, err = capfd.readouterr()
    for line in (
        "#SBATCH --partition=other",
        "#SBATCH --nodes=16",
        "export NCCL_DEBUG=INFO",
        "export MORE=1",
    ):
        assert line in out.splitlines()
    assert "module load cuda\ntrue\n" in out and "hunter2" not in out + err


@pytest.mark.parametrize(
    ("name", "words"),
    [("bgi", "'big'"), ("wrong", "a str"), ("unknown", "'partition'"), ("open", "is no reference")],
)
def test_wrong_profiles(name, words, tmp_path):
    """The fault in mind: the value of a secret in the message."""
    (tmp_path / "p.toml").write_text(PROFILE)
    with pytest.raises(LaunchError) as error:
        Job(("x",), **read_profile(name, tmp_path / "p.toml"))
    assert words in str(error.value) and "hunter2" not in str(error.value)
