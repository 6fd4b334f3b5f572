"""A folder of checkpoints (or a run, or a store's URL): `ls` lists the steps, `inspect` shows one, `verify` reads every byte.

shardtrain ckpt ls runs/gpt-tiny
shardtrain ckpt inspect runs/gpt-tiny --step 200
shardtrain ckpt ls gs://BUCKET/gpt-tiny
shardtrain ckpt verify runs/gpt-tiny      exit 1 if a step is not what was written
"""

from __future__ import annotations

import argparse
from typing import Any

from shardtrain.cli import shell
from shardtrain.tree import bytes_text, table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["ls", "inspect", "verify"])
    parser.add_argument("path", metavar="PATH", help="or gs://BUCKET/FOLDER, s3://BUCKET/FOLDER")
    parser.add_argument("--step", type=int, help="default: the newest; of verify: all")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain import checkpoint

    if options.action == "ls":
        steps = checkpoint.list_steps(options.path)
        if not options.json:
            rows = [
                (
                    s["step"],
                    "yes" if s["committed"] else "no",
                    bytes_text(s["bytes"]),
                    _mesh(s.get("mesh")),
                    s.get("time") or s.get("problem", ""),
                )
                for s in steps
            ]
            print(
                table(("step", "committed", "on disk", "mesh", "written"), rows) if rows else "no checkpoints"
            )
        return shell.DONE, {"path": options.path, "steps": steps}
    if options.action == "verify":
        return _verify(options)
    found = checkpoint.inspect(options.path, options.step)
    if not options.json:
        for name in ("path", "step", "time", "mesh", "parameters", "cursor", "groups", "versions"):
            if name in found:
                value = _mesh(found[name]) if name == "mesh" else found[name]
                print(f"{name}: {value}")
        print(f"on disk: {bytes_text(found['bytes'])}")
        leaves = [
            (p, "x".join(map(str, t["shape"])) or "scalar", t["dtype"], t["spec"])
            for p, t in found["tree"].items()
        ]
        print(table(("leaf", "shape", "dtype", "spec"), leaves))
    return shell.DONE, found


def _verify(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain import checkpoint

    result = checkpoint.verify(options.path, options.step)
    steps = result["steps"]
    if not options.json:
        rows = [
            (
                s["step"],
                *("yes" if s[name] else "no" for name in ("committed", "intact")),
                "; ".join(s["problems"]),
            )
            for s in steps
        ]
        print(table(("step", "committed", "intact", "problems"), rows))
    bad = [s for s in steps if s["committed"] and not s["intact"]]  # a save under way is no damage
    return (shell.FOUND if bad else shell.DONE), result


def _mesh(mesh: Any) -> str:
    return " ".join(f"{a}={n}" for a, n in mesh.items()) if isinstance(mesh, dict) else "-"
