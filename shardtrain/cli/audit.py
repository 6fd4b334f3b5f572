"""What a config's step sends, against the least that its layout has to send, and what is wrong with it.

shardtrain audit configs/gpt.py:tiny
shardtrain audit configs/llama.py:b1 --target v5e:2x4 --mesh.fsdp 8
shardtrain audit configs/gpt.py:tiny --lock plan.lock      compare with a lock file, or write it with --update

Exit code 1 where there is a finding of at least --severity, the ratio is over --at-most, or the lock differs; 2 where the
input is wrong.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from shardtrain.cli import shell
from shardtrain.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="FILE.py:FUNCTION or a saved config.json")
    parser.add_argument("--target", help="hardware, present or not: v5e:2x4, h100:1x8, cpu:8 (default)")
    parser.add_argument("--severity", default="warning", help="note, warning or error: exit 1 from here on")
    parser.add_argument("--at-most", type=float, help="exit 1 where bytes / minimum is more than this")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="XLA compiler option"
    )
    parser.add_argument("--svg", metavar="FILE", help="bytes by axis as a picture")
    parser.add_argument("--lock", metavar="FILE", help="compare with this plan.lock, and say what changed")
    parser.add_argument("--update", action="store_true", help="write the lock file")
    parser.set_defaults(takes_overrides=True)


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain.config.build import plan_for
    from shardtrain.plan.audit import audit, check_severity
    from shardtrain.plan.lock import Lock

    # All that can be wrong is found before anything is compiled.
    check_severity(options.severity)
    if options.at_most is not None and not options.at_most > 0:
        raise ConfigError(f"{options.at_most}", where="--at-most", fix="a number over 0, such as 1.05")
    if options.update and not options.lock:
        raise ConfigError("there is no file to write", where="--update", fix="--lock plan.lock --update")
    compiler = _options(options.option)
    for file in [options.svg, options.lock if options.update else None]:
        if file and not pathlib.Path(file).resolve().parent.is_dir():
            raise ConfigError("cannot be written: no such folder", where=file, fix="another place")
    old = Lock.read(options.lock) if options.lock and not options.update else None

    made, target, notes = plan_for(options.config, options.overrides, options.target)
    for note in notes:
        shell.say(note)
    found = audit(made.compile(target=target, options=compiler))
    result = found.as_json()
    code = shell.FOUND if found.worst(options.severity) else shell.DONE
    if not options.json:
        print(found)
    if options.at_most is not None and found.ratio is not None and found.ratio > options.at_most:
        code = shell.FOUND
        shell.say(f"{found.ratio:.3f} of the minimum is more than --at-most {options.at_most}")
    if options.svg:
        _write(options.svg, found.svg())
    if options.lock:
        lock = Lock.of(made, found)
        if old is None:
            _write(options.lock, lock.text())
        else:
            changes = lock.changes_from(old)
            result["changes"] = changes
            code = shell.FOUND if changes else code
            if not options.json:
                way_out = [f"  try: --lock {options.lock} --update, if that is meant"] if changes else []
                print("\n".join([f"\n{options.lock}:", *(changes or ["no change"]), *way_out]))
    return code, result


def _options(given: list[str]) -> dict[str, str]:
    pairs = dict(item.partition("=")[::2] for item in given)
    for name, value in pairs.items():
        if not name or not value:
            raise ConfigError(f"'{name}'", where="--option", fix="--option NAME=VALUE")
    return pairs


def _write(file: str, text: str) -> None:
    try:
        pathlib.Path(file).write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=file, fix="another place") from error
