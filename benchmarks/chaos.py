"""Faults at random moments of training: is anything lost? Prints JSON.

    python benchmarks/chaos.py --trials 200 --out trials.jsonl [--seed 0] [--only cut] [--json]

Each trial starts `shardtrain launch local` on two processes (sometimes four) of a small run on four simulated devices, waits
for a random step, or for a save to begin, and then

- sends SIGKILL, SIGSTOP or SIGTERM to a random process, or SIGKILL to the launcher; or
- pulls the cable of one of two hosts (network namespaces, a launcher and half of the processes in each), for a few
  seconds, for longer than anybody waits, or for good; or
- fills the disk that the run is on (a tmpfs), until some seconds later or for good.

Then the launchers start all again, or the run goes on, or the same run is started on another number of processes on one host.
Trials are appended to --out, one line each; those that are there are not run again, so it goes in pieces: `--trials` counts all.
`--only` runs those of them with these faults. What this machine does not permit (namespaces, mounts) is left out and said.
The reference is a run that nothing happens to, on the same number of processes. The hosts share a file system, which no cut
reaches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chaos_job import CONFIG, ROWS, STEPS, Launch, committed, rows, until
from chaos_job import job as start
from hosts import Disk, Hosts

SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM")
CHANCES = {"SIGKILL": 5, "SIGSTOP": 3, "SIGTERM": 5, "launcher": 2, "cut": 5, "disk-full": 4}
FORMULA = (
    "lost_commits: trials that went on from before the newest step committed when the fault came; corrupt_resumes: trials "
    "that did not end well; samples: rows of steps that are in the metrics twice or with other rows (repeated), or not "
    "at all (skipped; but for those that a full disk kept from being written, as the run itself said), by each step's "
    "sums of row numbers and of their squares; curves_equal: every loss bit for bit as the reference's while the number of "
    "processes is the same, within 1e-5 on another; preempted.clean: all processes left with 75, with the step of the last "
    "metrics committed (done_before: the run ended, its last step committed, before the step that they agreed on); "
    "went_on_alone: more than two steps on record after a host was cut off for good; detection_seconds: "
    "fault to the line of the launcher (of a cut: of both); recovery_seconds: fault to the next new step on record, with "
    "the time that the cable was out; full: space freed to the next commit"
)


def draw(seed: int, number: int) -> dict[str, Any]:
    """What happens in a trial, and when. `seconds`: until it is undone; None for good. `then`: processes that go on."""
    rng = random.Random(f"{seed}-{number}")
    processes = 4 if rng.random() < 0.15 else 2
    fault = rng.choices(list(CHANCES), list(CHANCES.values()))[0]
    drawn = {
        "trial": number,
        "seed": seed,
        "fault": fault,
        "processes": processes,
        "victim": rng.randrange(processes if fault in SIGNALS else 2),
        "in_save": rng.random() < 0.4,
        "step": rng.randrange(1, 11),
        "pause": rng.random() * 0.15,
        "then": processes if rng.random() < 0.6 else rng.choice([n for n in (1, 2, 4) if n != processes]),
        "seconds": None,
    }
    if fault in ("cut", "disk-full") and drawn["then"] == processes and rng.random() < 0.85:
        few, many = ((1.0, 5.0), (12.0, 20.0)) if fault == "cut" else ((0.2, 1.0), (1.0, 3.0))
        drawn["seconds"] = round(rng.uniform(*rng.choice((few, many))), 2)
    return drawn


def trial(number: int, seed: int, work: Path, reference: Any) -> dict[str, Any]:
    """Raises:
    OSError: this machine does not permit it.
    """
    drawn = draw(seed, number)
    fault, processes, then = drawn["fault"], drawn["processes"], drawn["then"]
    goes_on = then == processes and fault != "launcher"
    if fault in ("cut", "disk-full"):
        goes_on = drawn["seconds"] is not None
    first, whole = reference(processes), reference(then)
    folder = work / f"run-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    run = folder / "run"
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(Hosts(2)) if fault == "cut" else None
        disk = stack.enter_context(Disk(folder, 16)) if fault == "disk-full" else None
        job = start(work, run, processes, 3 if goes_on else 0, 0.12, hosts)
        stack.callback(job.kill)
        reached = until(lambda: len(rows(run)) >= drawn["step"], job)
        if drawn["in_save"]:
            saving = lambda: any((run / "checkpoints").glob(".saving/*"))
            reached = until(saving, job, 30.0) and reached
        time.sleep(drawn["pause"] * (0.2 if drawn["in_save"] else 1.0))
        before, at = committed(run), time.monotonic()
        missed = not reached or not job.running
        undone = threading.Event()
        if not missed:
            missed = not cause(drawn, job, hosts, disk, goes_on, undone)
        found: dict[str, Any] = {"detection_seconds": None, "recovery_seconds": None}
        words = ("launch: process", "launch: all") if goes_on else ("RunError",)
        if not missed and goes_on and fault == "disk-full":
            undone.wait()
            freed, old = time.monotonic(), committed(run)
            if until(lambda: committed(run) > old, job):
                found["recovery_seconds"] = time.monotonic() - freed
        elif not missed and goes_on:
            settled = len(rows(run)) + 3  # a short cut is seen by nobody: it goes on
            until(lambda: job.said(*words) or (undone.is_set() and len(rows(run)) > settled), job)
        elif not missed and fault not in ("SIGTERM", "launcher"):
            known = len(rows(run))
            job.end(120.0 if fault == "cut" else 900.0)
            if fault == "cut":
                found["went_on_alone"] = len(rows(run)) > known + 2
        else:
            done = job.end() if not goes_on else {}
        if fault == "SIGTERM" and not missed:
            left = job.said("launch: all") if goes_on else done.get("exit") == 75
            steps = [row["step"] for row in rows(run)]
            found["clean"] = bool(left) and committed(run) == max(steps, default=0)
            if not goes_on and done.get("exit") == 0 and committed(run) == STEPS:
                found["clean"] = None  # done before the step that they agreed on
        detected = job.said(*words)
        if detected and not missed and fault in ("SIGKILL", "SIGSTOP", "cut"):
            found["detection_seconds"] = detected - at
            named = ("no sign of life", "cut off", "no heartbeat", "no answer", "was killed by SIGKILL")
            found["named"] = any(n in line for _, _, line in job.lines for n in named)
        if goes_on:
            least = len(rows(run))
            while job.running and not (missed or found["recovery_seconds"] or fault == "disk-full"):
                seen = len(rows(run))
                if seen > least:
                    found["recovery_seconds"] = time.monotonic() - at
                least = min(least, seen)
                time.sleep(0.01)
        else:
            said = list(job.lines)
            if disk is not None:
                disk.free()
            job = start(work, run, then, 1, 0.0)
            stack.callback(job.kill)
            job.lines = said + job.lines
        done = job.end()
        if goes_on and found.get("clean") is False and done.get("exit") == 0 and not done.get("restarts"):
            found["clean"] = None if committed(run) == STEPS else False
        judged = judge(drawn, done, rows(run), first, whole, [line for _, _, line in job.lines])
    resumed = judged["resumed_from"]
    restarted = not goes_on or bool(done.get("restarts"))
    return {
        **drawn,
        "missed": missed,
        "committed_before": before,
        **judged,
        "lost_commit": done.get("exit") == 0 and restarted and resumed < before,
        "corrupt_resume": done.get("exit") != 0,
        **found,
        **({} if judged["curve_equal"] else {"said": [line for _, _, line in job.lines[-40:]]}),
    }


def cause(
    drawn: dict[str, Any],
    job: Launch,
    hosts: Hosts | None,
    disk: Disk | None,
    goes_on: bool,
    undone: threading.Event,
) -> bool:
    """Let it happen now; False where there is nobody left to be hit. `undone`: set when it is over again."""
    fault = drawn["fault"]
    if hosts is not None or disk is not None:
        if hosts is not None:
            hosts.link(drawn["victim"], up=False)
        elif disk is not None:
            disk.fill()

        def undo() -> None:
            if hosts is not None:
                hosts.link(drawn["victim"], up=True)
            elif disk is not None:
                disk.free()
            undone.set()

        if goes_on:
            timer = threading.Timer(drawn["seconds"], undo)
            timer.daemon = True
            timer.start()
        return True
    to_launcher = fault == "launcher" or (fault == "SIGTERM" and not goes_on)
    target = job.launchers[0].pid if to_launcher else job.workers().get(drawn["victim"], 0)
    if target:
        os.kill(target, signal.SIGKILL if fault == "launcher" else signal.Signals[fault])
    return bool(target)


def judge(
    drawn: dict[str, Any],
    done: dict[str, Any],
    kept: list[dict[str, Any]],
    first: dict[int, dict[str, Any]],
    whole: dict[int, dict[str, Any]],
    lines: list[str],
) -> dict[str, Any]:
    """The metrics of a run against those that nothing happened to, on the numbers of processes before and after."""
    resumed = (done.get("result") or {}).get("resumed_from") or 0
    numbers = [row["step"] for row in kept]
    wrong = sum(
        (row["ids"], row["squares"]) != (whole[row["step"]]["ids"], whole[row["step"]]["squares"])
        for row in kept
    )
    missing = set(range(1, STEPS + 1)) - set(numbers)
    told = [int(n) for line in lines for n in re.findall(r"step (\d+): metrics not written", line)]
    missing = {n for n in missing if not told or n < min(told)}
    equal = done.get("exit") == 0 and not missing and len(numbers) == len(set(numbers))
    for row in kept:
        own = (first if row["step"] <= resumed else whole)[row["step"]]["loss"]
        same = drawn["then"] == drawn["processes"]
        equal = equal and (row["loss"] == own if same else abs(row["loss"] - own) <= 1e-5 * abs(own))
    return {
        "resumed_from": resumed,
        "samples_repeated": ROWS * (len(numbers) - len(set(numbers)) + wrong),
        "samples_skipped": ROWS * len(missing),
        "curve_equal": equal,
    }


def spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"median": statistics.median(ordered), "p95": p95, "worst": ordered[-1], "count": len(ordered)}


def summary(trials: list[dict[str, Any]], left_out: dict[str, int] | None = None) -> dict[str, Any]:
    """What `--json` gives. Recovery is told by kind: that of a stopped process has its detection in it."""

    def of(name: str, *faults: str) -> dict[str, float] | None:
        return spread([t[name] for t in trials if t[name] is not None and t["fault"] in faults])

    preempted = [t["clean"] for t in trials if t.get("clean") is not None]
    return {
        "trials": len(trials),
        "by_fault": {f: sum(t["fault"] == f for t in trials) for f in CHANCES},
        "left_out": left_out or {},
        "in_save": sum(t["in_save"] for t in trials),
        "on_another_number": sum(t["then"] != t["processes"] for t in trials),
        "came_too_late": sum(t["missed"] for t in trials),
        "lost_commits": sum(t["lost_commit"] for t in trials),
        "corrupt_resumes": sum(t["corrupt_resume"] for t in trials),
        "samples_repeated": sum(t["samples_repeated"] for t in trials),
        "samples_skipped": sum(t["samples_skipped"] for t in trials),
        "curves_equal": sum(t["curve_equal"] for t in trials),
        "preempted": {
            "clean": sum(preempted),
            "of": len(preempted),
            "done_before": sum(t.get("clean", True) is None for t in trials),
        },
        "went_on_alone": sum(t.get("went_on_alone", False) for t in trials),
        "not_named": sum(not t.get("named", True) for t in trials),
        "detection_seconds": {
            "killed": of("detection_seconds", "SIGKILL"),
            "stopped": of("detection_seconds", "SIGSTOP"),
            "cut": of("detection_seconds", "cut"),
        },
        "recovery_seconds": {
            "killed": of("recovery_seconds", "SIGKILL"),
            "stopped": of("recovery_seconds", "SIGSTOP"),
            "preempted": of("recovery_seconds", "SIGTERM"),
            "cut": of("recovery_seconds", "cut"),
            "full": of("recovery_seconds", "disk-full"),
        },
    }


def run(trials: int, seed: int, out: Path | None, work: Path, only: tuple[str, ...] = ()) -> dict[str, Any]:
    (work / "config.py").write_text(CONFIG)
    known: list[dict[str, Any]] = []
    if out is not None and out.exists():
        known = [json.loads(line) for line in out.read_text().splitlines()]
        known = [t for t in known if t["seed"] == seed]
    references: dict[int, dict[int, dict[str, Any]]] = {}
    left_out: dict[str, int] = {}

    def reference(processes: int) -> dict[int, dict[str, Any]]:
        if processes not in references:
            folder = work / f"whole-{processes}"
            done = start(work, folder, processes, 0, 0.0).end()
            assert done.get("exit") == 0, f"the reference on {processes} processes did not end well: {done}"
            references[processes] = {row["step"]: row for row in rows(folder)}
        return references[processes]

    ran = {t["trial"] for t in known}
    for number in (n for n in range(trials) if n not in ran):
        if only and draw(seed, number)["fault"] not in only:
            continue
        try:
            found = trial(number, seed, work, reference)
        except OSError as error:
            why = f"{draw(seed, number)['fault']}: {error}"
            left_out[why] = left_out.get(why, 0) + 1
            continue
        known.append(found)
        shutil.rmtree(work / f"run-{seed}-{number}", ignore_errors=True)
        print(json.dumps(found), file=sys.stderr, flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(found) + "\n")
    return summary(known, left_out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="one line a trial; without it nothing is kept")
    parser.add_argument(
        "--only", nargs="+", default=(), choices=CHANCES, metavar="FAULT", help=" ".join(CHANCES)
    )
    parser.add_argument("--json", action="store_true", help="as always: one object on stdout")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # hosts and disks are taken away
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as work:
        found = run(options.trials, options.seed, options.out, Path(work), tuple(options.only))
    result = {
        "benchmark": "chaos",
        "formula": FORMULA,
        "seed": options.seed,
        "steps": STEPS,
        **found,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, local disk, simulated devices; load "
        f"{os.getloadavg()[1]:.1f}",
        "versions": {"jax": version("jax"), "python": platform.python_version()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
