"""What all commands share: arguments, the one JSON object, errors and exit codes.

0 done; 1 a check found something; 2 the input is wrong; 3 the run failed; 75 interrupted from
outside, committed, resumable; 130 a Ctrl-C where there was nothing to save.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterable
from typing import Any, NoReturn, Protocol

from shardtrain.errors import ConfigError, RunError, ShardTrainError, suggestion

DONE, FOUND, WRONG_INPUT, FAILED, INTERRUPTED, CANCELLED = 0, 1, 2, 3, 75, 130


class Command(Protocol):
    """A module of this folder. Its docstring is its help.

    With `STARTS_ANOTHER = True` what follows `--` is another command's, in `options.other`.
    """

    __doc__: str | None

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare positional arguments and flags; flags not declared are overrides of the config."""

    def run(self, options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
        """Do it; returns the exit code and the object of `--json`. Prints for people unless `options.json`."""


class Parser(argparse.ArgumentParser):
    """argparse that raises our errors instead of leaving."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where="arguments", fix=f"{self.prog} --help")


class Asked:
    """Ctrl-C and SIGTERM until a loop handles them itself: an exception that is not lost.

    Raised inside a callback of C code (JAX has one in every garbage collection) it is printed and dropped, and
    inside an import it may become another exception. So it is also kept in `caught`, where the loop finds it.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Asked:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self)
        return self

    def __call__(self, number: int, _: Any) -> None:
        self.caught = self.caught or number
        raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)

    def answer(self, name: str) -> tuple[int, dict[str, Any]]:
        """Exit code and JSON of a command that was stopped where there was nothing to save."""
        code = INTERRUPTED if self.caught == signal.SIGTERM else CANCELLED
        line = "interrupted; what was saved is kept, and the same command goes on"
        print(line, file=sys.stderr)
        return code, {"error": {"kind": "Interrupted", "where": name, "message": line, "try": "again"}}


def run(name: str, command: Command, arguments: list[str]) -> int:
    """Parse, run, print, and turn errors into one message and an exit code."""
    with Asked() as asked:
        code = _run(name, command, arguments, asked)
    if code not in (DONE, INTERRUPTED) and "shardtrain.mesh" in sys.modules:
        from shardtrain.mesh import leave

        leave(code)
    return code


def _run(name: str, command: Command, arguments: list[str], asked: Asked) -> int:
    starts_another = getattr(command, "STARTS_ANOTHER", False) and "--" in arguments
    cut = arguments.index("--") if starts_another else len(arguments)
    arguments, other = arguments[:cut], arguments[cut + 1 :]
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
        options.overrides, options.other = rest, other
        code, result = command.run(options)
    except ShardTrainError as error:
        code = FAILED if isinstance(error, RunError) or _no_space(error.__cause__) else WRONG_INPUT
        result = {"error": error.as_json()}
        if debug:
            traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code, result = asked.answer(name)
    except BrokenPipeError:
        return _quiet_pipe()
    except Exception as error:
        code, result = asked.answer(name) if asked.caught else _failed(name, error, debug)
    if out is not None:
        with os.fdopen(out, "w") as stream:
            stream.write(json.dumps(result, default=str, allow_nan=False) + "\n")
    return code


def _no_space(error: BaseException | None) -> bool:
    """A disk or quota that is full may have room later: that is not the input's fault, and launchers try again."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _failed(name: str, error: Exception, debug: bool) -> tuple[int, dict[str, Any]]:
    if debug:
        traceback.print_exc()
    if isinstance(error, OSError) and _no_space(error):
        full = RunError(
            str(error.strerror),
            where=str(error.filename or name),
            fix="free space there; the same command goes on from what was saved",
        )
        print(f"RunError: {full}", file=sys.stderr)
        return FAILED, {"error": full.as_json()}
    if not debug:
        frames = traceback.extract_tb(error.__traceback__)
        last = frames[-1] if frames else None
        at = f" ({last.filename}:{last.lineno})" if last else ""
        print(
            f"the run failed: {type(error).__name__}: {error}{at}\n  --debug shows the traceback",
            file=sys.stderr,
        )
    message = {"kind": type(error).__name__, "where": name, "message": str(error), "try": "--debug"}
    return FAILED, {"error": message}


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


def check_place(file: str | None, flag: str) -> None:
    """Before the work: whether a file can be written there.

    Raises:
        ConfigError: a folder, no folder around it, or one that is not ours to write in.
    """
    if file is None:
        return
    path = pathlib.Path(file)
    problem = (
        "is a folder"
        if path.is_dir()
        else "no such folder"
        if not path.resolve().parent.is_dir()
        else "not allowed"
        if not os.access(path.resolve().parent, os.W_OK)
        else ""
    )
    if problem:
        raise ConfigError(f"cannot be written: {problem}", where=f"{flag} {file}", fix="another place")


def write(file: str, text: str, flag: str) -> None:
    """All of it or nothing: what was there before stays until the new one is whole.

    Raises:
        ConfigError: the disk does not take it.
    """
    path = pathlib.Path(file)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        work.write_text(text, encoding="utf-8")
        os.replace(work, path)
    except OSError as error:
        work.unlink(missing_ok=True)
        message = f"cannot be written: {error.strerror}"
        raise ConfigError(message, where=f"{flag} {file}", fix="another place") from error


def say(text: Any = "") -> None:
    """A line for people, on stderr; stdout is for what a program may read."""
    print(text, file=sys.stderr, flush=True)
