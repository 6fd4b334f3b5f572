"""Configs from Python files and JSON, and back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import sys
import traceback
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

from shardtrain.config.schema import KINDS, RunConfig
from shardtrain.errors import ConfigError, ShardTrainError, suggestion


def load_config(name: str) -> RunConfig:
    """`configs/gpt.py:tiny` (a Python file and a function in it), or a saved `config.json`, or a run folder.

    Raises:
        ConfigError: no such file or function, or not a `RunConfig`.
    """
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        value = load_name(name)
        try:
            config = value() if callable(value) else value
        except ShardTrainError:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"{function}() failed: {type(error).__name__}: {error}",
                where=f"{path}{_line(error, _find(path))}",
                fix="a function without arguments that returns a RunConfig",
            ) from error
        if not isinstance(config, RunConfig):
            raise ConfigError(
                f"{function} gave a {type(config).__name__}",
                where=name,
                fix="a function that returns a RunConfig",
            )
        if type(config.model) not in KINDS.values():
            raise ConfigError(
                f"model is a {type(config.model).__name__}",
                where=name,
                fix="a GPTConfig, a LlamaConfig, a MoEConfig, or shardtrain.config.custom(...)",
            )
        return from_json(to_json(config), where=name)  # the types of a file are checked as those of JSON are
    file = pathlib.Path(name)
    if file.is_dir():
        file = file / "config.json"
    if name.endswith(".py"):
        found = _names(_find(name))
        raise ConfigError("which function?", where=name, fix=f"{name}:{found[0] if found else 'NAME'}")
    if file.suffix != ".json":
        raise ConfigError("neither FILE.py:FUNCTION nor a config.json", where=name, fix="configs/gpt.py:tiny")
    return from_json(_read_json(file), where=str(file))


def _read_json(file: pathlib.Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(file), fix="configs/gpt.py:tiny") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(file), fix="a JSON text file") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}",
            where=str(file),
            fix="restore the file",
        ) from error


def _find(path: str) -> pathlib.Path:
    """The file itself, or the one of that name that ships with the library."""
    file = pathlib.Path(path)
    if file.is_file():
        return file
    package = pathlib.Path(__file__).parent.parent
    for root in (package / "_configs", package.parent / "configs"):
        shipped = root / file.name
        if file.parent.name in ("", "configs") and shipped.is_file():
            return shipped
    here = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
    raise ConfigError(
        "no such file", where=path, fix=suggestion(path, [*here, "configs/gpt.py"], "check the path")
    )


def _names(file: pathlib.Path) -> list[str]:
    module = _import(file)
    own = lambda v: callable(v) and getattr(v, "__module__", None) == module.__name__  # noqa: E731
    return [n for n, v in vars(module).items() if not n.startswith("_") and own(v)]


def _import(file: pathlib.Path) -> types.ModuleType:
    file = file.resolve()
    name = f"_shardtrain_config_{file.stem}_{abs(hash(str(file)))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ShardTrainError) or not isinstance(error, Exception | SystemExit):
            raise
        if isinstance(error, SyntaxError):
            at = f"line {error.lineno}: " if error.lineno else ""
            raise ConfigError(f"{at}{error.msg}", where=str(file), fix="correct the file") from error
        raise ConfigError(
            f"{type(error).__name__}: {error}", where=f"{file}{_line(error, file)}", fix="correct the file"
        ) from error
    return module


def _line(error: BaseException, file: pathlib.Path) -> str:
    """`:12`, where in the user's file an error came up; empty if it did not pass through there."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == str(file.resolve())]
    return f":{lines[-1]}" if lines else ""


def load_name(reference: str) -> Any:
    """The object that `file.py:name` names."""
    path, _, name = reference.rpartition(":")
    file = _find(path)
    module = _import(file)
    if not hasattr(module, name):
        raise ConfigError(
            f"no function '{name}'",
            where=reference,
            fix=suggestion(name, _names(file), "define it") + f" in {path}",
        )
    return getattr(module, name)


def to_json(config: RunConfig) -> dict[str, Any]:
    """The resolved config; `from_json` reads it back to an equal value."""
    kinds = {cls: kind for kind, cls in KINDS.items()}
    data = dataclasses.asdict(config)
    data["model"] = {"kind": kinds[type(config.model)], **data["model"]}
    return data


def from_json(data: Any, where: str = "config") -> RunConfig:
    """A `RunConfig` from its JSON; unknown fields and wrong types are errors that name the field."""
    if not isinstance(data, dict):
        raise ConfigError(f"a {type(data).__name__}, not an object", where=where, fix="a saved config.json")
    data = dict(data)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("kind") not in KINDS:
        kind = model.get("kind") if isinstance(model, dict) else None
        raise ConfigError(
            f"kind {kind!r}", where=f"{where}: model", fix=suggestion(str(kind), KINDS, "a saved config.json")
        )
    rest = {k: v for k, v in model.items() if k != "kind"}
    data["model"] = _build(KINDS[model["kind"]], rest, f"{where}: model")
    return typing.cast(RunConfig, _build(RunConfig, data, where))


def _build(cls: type, data: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in data:
        if name not in fields:
            raise ConfigError(f"no field '{name}'", where=where, fix=suggestion(name, fields, "remove it"))
    missing = [
        n
        for n, f in fields.items()
        if n not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"no {', '.join(missing)}", where=where, fix="a saved config.json has every field")
    values = {n: _value(hints[n], v, f"{where}: {n}") for n, v in data.items()}
    return check(cls(**values), where)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(
                f"{value!r} is a {type(value).__name__}", where=where, fix="an object with its fields"
            )
        return _build(typing.cast(type, hint), value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"{value!r}", where=where, fix=suggestion(str(value), map(str, args), "one of these")
            )
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if origin is dict and isinstance(value, dict):
        return value
    wanted: Callable[[Any], bool] = {
        int: lambda v: isinstance(v, int) and not isinstance(v, bool),
        float: lambda v: isinstance(v, int | float) and not isinstance(v, bool),
        bool: lambda v: isinstance(v, bool),
        str: lambda v: isinstance(v, str),
    }.get(hint, lambda v: True)
    if not wanted(value):
        raise ConfigError(
            f"{value!r} is a {type(value).__name__}, not {getattr(hint, '__name__', hint)}",
            where=where,
            fix="see the default",
        )
    return float(value) if hint is float else value


def check(config: Any, where: str = "config") -> Any:
    """Numbers that no run can have."""
    if not isinstance(config, RunConfig):
        return config
    positive = {
        "global_batch": config.global_batch,
        "steps": config.steps,
        "microbatches": config.microbatches,
    }
    for name, value in {**positive, "keep": config.keep}.items():
        if value < 1:
            raise ConfigError(f"{value}", where=f"{where}: {name}", fix="1 or more")
    for name in ("eval_every", "checkpoint_every", "replica_check_every"):
        if (value := getattr(config, name)) < 0:
            raise ConfigError(f"{value}", where=f"{where}: {name}", fix="0 for never, or a number of steps")
    if config.optimizer.warmup < 0 or config.optimizer.clip < 0:
        raise ConfigError(
            f"warmup {config.optimizer.warmup}, clip {config.optimizer.clip}",
            where=f"{where}: optimizer",
            fix="0 for none, or more",
        )
    if config.optimizer.learning_rate <= 0:
        raise ConfigError(
            f"{config.optimizer.learning_rate}",
            where=f"{where}: optimizer.learning_rate",
            fix="a positive number",
        )
    if config.data.quarantine < 0:
        raise ConfigError(
            f"{config.data.quarantine}",
            where=f"{where}: data.quarantine",
            fix="0 for none, or a number of rows",
        )
    if config.data.sequence < 1:
        raise ConfigError(f"{config.data.sequence}", where=f"{where}: data.sequence", fix="1 or more")
    return config


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """`optimizer.learning_rate` -> value, for every leaf."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            result.update(flat(value, f"{prefix}{field.name}."))
        else:
            result[f"{prefix}{field.name}"] = value
    return result


def difference(old: RunConfig, new: RunConfig, ignore: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Leaves that differ, but for fields under the names in `ignore`."""
    a, b = flat(old), flat(new)
    skip = lambda name: any(name == i or name.startswith(f"{i}.") for i in ignore)  # noqa: E731
    return {n: (a.get(n), b.get(n)) for n in {**a, **b} if not skip(n) and a.get(n) != b.get(n)}
