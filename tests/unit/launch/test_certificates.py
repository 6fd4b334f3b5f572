"""Certificates of a run: who may read them, what they hold, and who is kept out by them."""

import json
import os
import pathlib
import socket
import stat
import subprocess
import sys

import pytest

from shardtrain.cli import main
from shardtrain.errors import LaunchError
from shardtrain.launch import certificates, jobset, slurm
from shardtrain.launch.certificates import FILES
from shardtrain.launch.job import Job
from shardtrain.launch.local import Local, starts

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_made_for_its_owner_alone(tmp_path):
    """Signed by their authority, for the names asked for and loopback. Failed once with the key as umask leaves it."""
    from cryptography import x509

    place = tmp_path / "tls"
    place.mkdir(mode=0o755)
    before = os.umask(0)
    try:
        certificates.make(place, ["node1", "10.0.0.1"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert sorted(p.name for p in place.iterdir()) == sorted(FILES.values())
    assert {stat.S_IMODE(p.stat().st_mode) for p in place.iterdir()} == {0o600}
    ca, cert = (x509.load_pem_x509_certificate((place / n).read_bytes()) for n in ("ca.pem", "cert.pem"))
    cert.verify_directly_issued_by(ca)
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node1", "localhost"]
    assert {str(a) for a in names.get_values_for_type(x509.IPAddress)} == {"10.0.0.1", "127.0.0.1", "::1"}
    key = (place / "key.pem").read_bytes()
    certificates.make(place)
    assert (place / "key.pem").read_bytes() != key


def test_several_hosts_by_hand(tmp_path, capsys):
    """Refused without a word on it; with a folder every process is told; a key that others read is refused."""
    several = {"hosts": 2, "coordinator": "h:1"}
    with pytest.raises(LaunchError, match="nothing keeps others"):
        Local(("x",), 1, **several)
    assert not any(
        "MTLS" in name for name in starts(Local(("x",), 1, mtls="off", **several), 1, 0, 1)[0].environment
    )
    with pytest.raises(LaunchError, match=r"no cert\.pem"):
        Local(("x",), 1, mtls=str(tmp_path / "none"), **several)
    assert certificates.main([str(tmp_path / "tls"), "h"]) == 0
    given = starts(Local(("x",), 1, mtls=str(tmp_path / "tls"), **several), 1, 0, 1)[0].environment
    assert given["JAX_MTLS_KEY_FILE"] == str(tmp_path / "tls" / "key.pem")
    (tmp_path / "tls" / "key.pem").chmod(0o640)
    code = main(["launch", "local", "--hosts", "2", "--coordinator", "h:1", "--mtls", str(tmp_path / "tls"), "--",
                 "train", "c.py:f"])  # fmt: skip
    assert code == 2 and "can be read by others" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert certificates.main([str(tmp_path / "file" / "tls")]) == 2


def test_slurm_makes_them_where_it_was_submitted(tmp_path):
    """By a real shell: the processes are told of files that are there, and they are gone with the job. Failed once without
    the trap."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fakes = {
        "srun": 'while [[ "$1" == --* ]]; do shift; done; ls -l "$JAX_MTLS_CERT_FILE" "$JAX_MTLS_KEY_FILE" "$JAX_MTLS_CA_FILE"',
        "scontrol": "printf 'node1\\nnode2\\n'",
    }
    for name, body in fakes.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    place = tmp_path / "a b"
    place.mkdir()
    env = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "n",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_SUBMIT_DIR": str(place),
        "PYTHONPATH": str(ROOT),
    }
    script = slurm.script(Job((sys.executable, "x"), hosts=2))
    done = subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("-rw-------") == 3, done.stderr
    assert list(place.iterdir()) == []
    assert "MTLS" not in slurm.script(Job((sys.executable, "x"), mtls="off"))


def test_jobset_hands_a_secret_over(monkeypatch):
    """The key is in the Secret alone, and in nothing that is printed. Failed once with the dry run's text handed over."""
    job = Job(("python", "x"), name="gpt", image="r/i:1", where={"namespace": "team"})
    secret, made = json.loads(jobset.handed_over(job))["items"]
    assert secret["metadata"] == {"name": "gpt-tls", "namespace": "team"}
    assert "PRIVATE KEY" in secret["stringData"]["key.pem"] and "PRIVATE KEY" not in json.dumps(made)
    assert "PRIVATE KEY" not in jobset.handed_over(job, dry=True)
    given = []
    monkeypatch.setattr(jobset, "ask", lambda command, text: given.append(text))
    jobset.submit(job)
    assert "PRIVATE KEY" in given[0]
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["secret"]["secretName"] == "gpt-tls"
    env = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
    assert env["JAX_MTLS_CA_FILE"] == pod["containers"][0]["volumeMounts"][0]["mountPath"] + "/ca.pem"
    assert "secret/gpt-tls" in jobset.stop("gpt", "team")


JOIN = """
import sys
import shardtrain as st
print(st.init_distributed(initialization_timeout=int(sys.argv[1])), flush=True)
"""


@pytest.mark.slow
def test_who_has_none_is_kept_out(tmp_path):
    """Two processes join; one without a certificate that says it is the second does not, and does them no harm. The fault in
    mind: variables that JAX does not read."""
    certificates.make(tmp_path / "tls")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(index, seconds, extra):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
               "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index), **extra}  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", JOIN, str(seconds)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    shown = certificates.environment(tmp_path / "tls")
    first = start(0, 120, shown)
    stranger = start(1, 8, {})
    out = stranger.communicate(timeout=90)[0]
    assert stranger.returncode != 0 and "process 1 of 2" not in out
    second = start(1, 120, shown)
    for process in (first, second):
        out = process.communicate(timeout=120)[0]
        assert process.returncode == 0 and " of 2, " in out, out[-500:]
