"""The command line: one file per command, one way to fail."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": "run a config; the same command on the same output resumes it",
    "resume": "go on with a run, on whatever devices are left; --dry-run says what stays exact",
    "plan": "where every array lives, memory, bytes, seconds; on hardware that need not be here",
    "search": "the best layouts for hardware that need not be here, and why the others lost",
    "audit": "collectives against the minimum, findings with source lines; exit 1 on one",
    "verify": "the same training on one device and on other layouts, leaf by leaf; exit 1 where one differs",
    "config": "the resolved config, and what differs from the defaults",
    "generate": "text from a trained run",
    "data": "prepare: the user's text, tokenised and packed",
    "ckpt": "ls | inspect | verify: what is in a folder of checkpoints, and whether it is what was written",
    "launch": "a command in several processes, here or on a cluster, started again when one fails",
    "status": "what a run is doing",
    "logs": "the last lines of a run's processes",
    "stop": "have a run save and end",
    "calibrate": "what this machine's devices reach, measured, for plan and search",
    "doctor": "devices, versions, and what is wrong with this machine",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code (see the README)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    from shardtrain.cli import shell

    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from shardtrain import __version__

        print(__version__)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        return shell.unknown_command(name, COMMANDS, arguments)
    module = importlib.import_module(f"shardtrain.cli.{name}")
    return shell.run(name, module, arguments[1:])


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: shardtrain COMMAND [CONFIG] [--FLAG VALUE ...] [--json] [--debug]",
            "",
            *lines,
            "",
            "CONFIG is FILE.py:FUNCTION (configs/gpt.py:tiny) or a saved config.json.",
            "shardtrain COMMAND --help says more.",
        ]
    )
