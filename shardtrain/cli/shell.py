"""What all commands share: arguments, the one JSON object, errors and exit codes.

0 done; 1 a check found something; 2 the input is wrong; 3 the run failed; 75 interrupted from
outside, committed, resumable.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterable
from typing import Any, NoReturn, Protocol

from shardtrain.errors import ConfigError, RunError, ShardTrainError, suggestion

DONE, FOUND, WRONG_INPUT, FAILED, INTERRUPTED = 0, 1, 2, 3, 75


class Command(Protocol):
    """A module of this folder. Its docstring is its help."""

    __doc__: str | None

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare positional arguments and flags; flags not declared are overrides of the config."""

    def run(self, options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
        """Do it; returns the exit code and the object of `--json`. Prints for people unless `options.json`."""


class Parser(argparse.ArgumentParser):
    """argparse that raises our errors instead of leaving."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where="arguments", fix=f"{self.prog} --help")


def run(name: str, command: Command, arguments: list[str]) -> int:
    """Parse, run, print, and turn errors into one message and an exit code."""
    debug, as_json = "--debug" in arguments, "--json" in arguments
    out = _keep_stdout() if as_json else None
    code = WRONG_INPUT
    result: dict[str, Any] = {}
    try:
        parser = Parser(
            prog=f"shardtrain {name}",
            description=command.__doc__,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout and nothing else there"
        )
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.arguments(parser)
        options, rest = parser.parse_known_args(arguments)
        if rest and not getattr(options, "takes_overrides", False):
            known = [f for a in parser._actions for f in a.option_strings if f.startswith("--")]
            raise ConfigError(
                f"unexpected argument '{rest[0]}'",
                where="arguments",
                fix=suggestion(rest[0], known, f"{parser.prog} --help"),
            )
        options.overrides = rest
        code, result = command.run(options)
    except ShardTrainError as error:
        code = FAILED if isinstance(error, RunError) else WRONG_INPUT
        result = {"error": error.as_json()}
        if debug:
            traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted before anything was saved", file=sys.stderr)
        code, result = (
            130,
            {"error": {"kind": "Interrupted", "where": name, "message": "interrupted", "try": "again"}},
        )
    except BrokenPipeError:
        return _quiet_pipe()
    except Exception as error:
        code = FAILED
        result = {
            "error": {"kind": type(error).__name__, "where": name, "message": str(error), "try": "--debug"}
        }
        if debug:
            traceback.print_exc()
        else:
            frames = traceback.extract_tb(error.__traceback__)
            last = frames[-1] if frames else None
            at = f" ({last.filename}:{last.lineno})" if last else ""
            print(
                f"the run failed: {type(error).__name__}: {error}{at}\n  --debug shows the traceback",
                file=sys.stderr,
            )
    if out is not None:
        with os.fdopen(out, "w") as stream:
            stream.write(json.dumps(result, default=str, allow_nan=False) + "\n")
    return code


def _keep_stdout() -> int:
    """Keep descriptor 1 for the object; whatever else writes there (gloo does) goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return kept


def _quiet_pipe() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return DONE


def unknown_command(name: str, commands: Iterable[str], arguments: list[str]) -> int:
    """Exit code 2, with the command that was meant."""
    error = ConfigError(
        f"no command '{name}'", where="shardtrain", fix=suggestion(name, commands, "shardtrain --help")
    )
    if "--json" in arguments:
        print(json.dumps({"error": error.as_json()}))
    print(f"ConfigError: {error}", file=sys.stderr)
    return WRONG_INPUT


def say(text: Any = "") -> None:
    """A line for people, on stderr; stdout is for what a program may read."""
    print(text, file=sys.stderr, flush=True)
