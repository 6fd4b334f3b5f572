"""Kubernetes: a JobSet manifest, handed to the user's own `kubectl` on stdin.

One pod per process. On GPUs (GKE, EKS) they find each other by the JobSet's stable names, which takes no rights in the
cluster; on TPU slices by what GKE gives every pod. They show each other a certificate that is made when the manifest is handed
over, with it, as a Secret. Pods that end with wrong input end the job; after all else the
JobSet starts all of them again, at most `max_restarts` times.
"""

from __future__ import annotations

import json
import re
from typing import Any

from shardtrain.errors import LaunchError
from shardtrain.launch import certificates
from shardtrain.launch.client import ask
from shardtrain.launch.job import Job

WORKERS = "workers"
_TLS = "/etc/shardtrain-tls"
PROVIDERS = ("gke-tpu", "gke", "eks")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_RESTARTS = "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"


def manifest(job: Job) -> dict[str, Any]:
    """The JobSet. `where`: provider (gke-tpu, gke, eks), namespace, slices and topology of TPUs, node selectors.

    `accelerator`: what the node is called: tpu-v5-lite-podslice, nvidia-h100-80gb (GKE), p5.48xlarge (EKS).
    `mounts`: CLAIM:/path. `secrets`: variable -> secret:NAME/KEY.

    Raises:
        LaunchError: a name that Kubernetes does not take, no image, or an unknown provider.
    """
    provider = job.where.get("provider", "gke")
    if provider not in PROVIDERS:
        raise LaunchError(f"'{provider}'", where="--set provider", fix=", ".join(PROVIDERS))
    # pods are called NAME-workers-0-15-xxxxx, in at most 63 characters
    if not _LABEL.fullmatch(job.name) or len(job.name) > 40:
        raise LaunchError(
            f"{job.name!r} is no name for Kubernetes",
            where="--name",
            fix="up to 40 of a-z, 0-9 and -, such as gpt-small",
        )
    if not job.image:
        raise LaunchError("no image", where="--image", fix="--image REGISTRY/IMAGE:TAG that has shardtrain")
    tpu = provider == "gke-tpu"
    slices = int(job.where.get("slices", "1"))
    if slices < 1 or (slices > 1 and not tpu):
        raise LaunchError(
            f"{slices} slices of {provider}", where="--set slices", fix="1; only TPUs come in slices"
        )
    replicas = {"name": WORKERS, "replicas": slices, "template": {"spec": _job_spec(job, provider)}}
    annotations = (
        {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if tpu else {}
    )
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            **({"namespace": job.where["namespace"]} if "namespace" in job.where else {}),
            **({"annotations": annotations} if annotations else {}),
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [
                    {
                        "name": "wrongInput",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [replicas],
        },
    }


def _job_spec(job: Job, provider: str) -> dict[str, Any]:
    return {
        "completionMode": "Indexed",
        "parallelism": job.processes,
        "completions": job.processes,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": [2, 126, 127]},
                }
            ]
        },
        "template": {"spec": _pod(job, provider)},
    }


def _pod(job: Job, provider: str) -> dict[str, Any]:
    resource = "google.com/tpu" if provider == "gke-tpu" else "nvidia.com/gpu"
    count = {resource: str(job.devices_per_process)}
    container: dict[str, Any] = {
        "name": "train",
        "image": job.image,
        "command": _command(job),
        "env": _environment(job, provider),
        "resources": {"limits": count, "requests": count},
        "ports": [{"containerPort": job.port}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        "containers": [container],
    }
    if job.mtls == "on":
        pod["volumes"] = [
            {"name": "tls", "secret": {"secretName": _secret_name(job.name), "defaultMode": 0o444}}
        ]
        container["volumeMounts"] = [{"name": "tls", "mountPath": _TLS, "readOnly": True}]
    if selector := _selector(job, provider):
        pod["nodeSelector"] = selector
    if provider != "gke-tpu":
        pod["tolerations"] = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if job.account:
        pod["serviceAccountName"] = job.account
    for index, mount in enumerate(job.mounts):
        claim, _, path = mount.partition(":")
        if not _LABEL.fullmatch(claim) or not path.startswith("/"):
            raise LaunchError(f"{mount!r}", where="--mount", fix="CLAIM:/path of a volume claim")
        name = f"mount-{index}"
        pod.setdefault("volumes", []).append({"name": name, "persistentVolumeClaim": {"claimName": claim}})
        container.setdefault("volumeMounts", []).append({"name": name, "mountPath": path})
    return pod


def _command(job: Job) -> list[str]:
    # Kubernetes replaces $(NAME) in a command; $$ is how it is told not to
    words = [word.replace("$(", "$$(") for word in job.command]
    if not job.setup:
        return words
    return ["/bin/bash", "-ec", "\n".join([*job.setup, 'exec "$@"']), "bash", *words]


def _environment(job: Job, provider: str) -> list[dict[str, Any]]:
    values = {
        **job.environment,
        "SHARDTRAIN_TOTAL_DEVICES": str(job.devices * int(job.where.get("slices", "1"))),
    }
    if job.mtls == "on":
        values |= certificates.environment(_TLS)
    values["SHARDTRAIN_LAUNCH"] = json.dumps(
        {"kind": "jobset", "job": job.name, "namespace": job.where.get("namespace", "")}
    )
    if provider != "gke-tpu":
        values |= {
            "JAX_COORDINATOR_ADDRESS": f"{job.name}-{WORKERS}-0-0.{job.name}:{job.port}",
            "JAX_NUM_PROCESSES": str(job.processes),
            "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(job.devices_per_process))),
        }
    found: list[dict[str, Any]] = [{"name": k, "value": v.replace("$(", "$$(")} for k, v in values.items()]
    found.append({"name": "SHARDTRAIN_ATTEMPT", "valueFrom": {"fieldRef": {"fieldPath": _RESTARTS}}})
    for variable, reference in job.secrets.items():
        name, _, key = reference.removeprefix("secret:").partition("/")
        if not reference.startswith("secret:") or not key:
            raise LaunchError(
                f"'{reference}' is not known here", where=f"secrets.{variable}", fix='"secret:NAME/KEY"'
            )
        found.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}})
    return found


def _selector(job: Job, provider: str) -> dict[str, str]:
    label = {
        "gke-tpu": "cloud.google.com/gke-tpu-accelerator",
        "gke": "cloud.google.com/gke-accelerator",
        "eks": "node.kubernetes.io/instance-type",
    }[provider]
    found = {label: job.accelerator} if job.accelerator else {}
    if provider == "gke-tpu":
        if "topology" not in job.where or not job.accelerator:
            raise LaunchError(
                "a TPU slice is asked for by its kind and topology",
                where="--accelerator, --set topology",
                fix="--accelerator tpu-v5-lite-podslice --set topology=4x4",
            )
        found["cloud.google.com/gke-tpu-topology"] = job.where["topology"]
        _check_topology(job)
    return found


def _check_topology(job: Job) -> None:
    sizes = job.where["topology"].split("x")
    chips = 1
    for size in sizes:
        if not size.isdigit() or not int(size):
            raise LaunchError(
                f"'{job.where['topology']}'", where="--set topology", fix="such as 4x4, or 2x2x4"
            )
        chips *= int(size)
    if chips != job.devices:
        raise LaunchError(
            f"{job.where['topology']} has {chips} chips, {job.hosts} hosts x {job.processes_per_host} x "
            f"{job.devices_per_process} are {job.devices}",
            where="--set topology",
            fix="as many hosts and devices as the slice has",
        )


def handed_over(job: Job, *, dry: bool = False) -> str:
    """The text for `command`: the manifest and, with mTLS, the Secret of its certificate. `dry`: without the secret itself."""
    made = manifest(job)
    if job.mtls == "off":
        return json.dumps(made, indent=1)
    names = [f"{job.name}-{WORKERS}-0-0.{job.name}", f"*.{job.name}"]
    later = "(made when it is handed over)"
    files = dict.fromkeys(certificates.FILES.values(), later)
    if not dry:
        files = {name: content.decode() for name, content in certificates.made(names).items()}
    place = {k: v for k, v in made["metadata"].items() if k == "namespace"}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": _secret_name(job.name), **place},
        "type": "Opaque",
        "stringData": files,
    }
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": [secret, made]}, indent=1)


def _secret_name(job: str) -> str:
    return f"{job}-tls"


def command(job: Job) -> list[str]:
    """What is run; the manifest is its stdin."""
    return ["kubectl", *_context(job.where.get("context", "")), "apply", "--filename=-", *job.flags]


def submit(job: Job) -> dict[str, Any]:
    """Hand it over; returns its name and namespace."""
    ask(command(job), handed_over(job))
    return {"kind": "jobset", "job": job.name, "namespace": job.where.get("namespace", "")}


def _context(name: str) -> list[str]:
    return [f"--context={name}"] if name else []


def _namespace(name: str) -> list[str]:
    return [f"--namespace={name}"] if name else []


def status(job: str, namespace: str = "") -> list[str]:
    """The command that says how a job is."""
    return ["kubectl", *_namespace(namespace), "get", "jobset", job]


def logs(job: str, namespace: str = "") -> list[str]:
    """The command that follows its first process's lines."""
    selector = f"jobset.sigs.k8s.io/jobset-name={job},batch.kubernetes.io/job-completion-index=0"
    return ["kubectl", *_namespace(namespace), "logs", f"--selector={selector}", "--tail=100"]


def stop(job: str, namespace: str = "") -> list[str]:
    """The command that ends it."""
    things = [f"jobset/{job}", f"secret/{_secret_name(job)}"]
    return ["kubectl", *_namespace(namespace), "delete", "--ignore-not-found", *things]
