"""Look at the checkpoints in a store, as `list_steps`, `inspect` and `verify` do in a folder. Asks for no lease."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardtrain.checkpoint import agreement, head, transfer
from shardtrain.checkpoint.folder import local
from shardtrain.checkpoint.store import Store, StoreError, refusal
from shardtrain.errors import CheckpointError

CUT_OFF = "under way, or cut off"


def list_steps(url: str) -> list[dict[str, Any]]:
    """As `shardtrain.checkpoint.list_steps`; `bytes` is left out where a step is not committed."""
    with _telling(url):
        store = Store(url)
        content, _ = head.read(store)
        found: list[dict[str, Any]] = []
        for step, entry in _steps(content).items():
            line = {"step": step, "committed": True, "bytes": entry.get("bytes", 0)}
            try:
                known = transfer.fetch_manifest(store, step, entry["place"])[1]
                line |= {name: known.get(name) for name in ("time", "mesh", "parameters")}
            except ValueError as error:
                line |= {"committed": False, "problem": str(error)}
            found.append(line)
        for step in _unfinished(store, content):
            found.append({"step": step, "committed": False, "bytes": 0, "problem": CUT_OFF})
        return sorted(found, key=lambda line: (line["step"], line["committed"]))


def inspect(url: str, step: int | None = None) -> dict[str, Any]:
    """As `shardtrain.checkpoint.inspect`."""
    with _telling(url):
        store = Store(url)
        steps = _steps(head.read(store)[0])
        step = _chosen(url, list(steps), step)[-1]
        place = steps[step]["place"]
        try:
            sealed, content = transfer.fetch_manifest(store, step, place)
        except ValueError as error:
            raise CheckpointError(
                f"step {step} is damaged",
                where=f"{url}/{place}",
                why=str(error),
                fix="--step, of another one",
            ) from error
        size = sum(content["files"].values()) + len(sealed)
        return {**content, "path": f"{store.url}/{place}", "committed": True, "bytes": size}


def newest(url: str) -> dict[str, Any] | None:
    """`inspect` of the newest step whose manifest can be read; None where nothing is committed."""
    with _telling(url):
        store = Store(url)
        for step, entry in sorted(_steps(head.read(store)[0]).items(), reverse=True):
            with contextlib.suppress(ValueError):
                return transfer.fetch_manifest(store, step, entry["place"])[1]
        return None


def verify(url: str, step: int | None = None) -> dict[str, Any]:
    """As `shardtrain.checkpoint.verify`; reads every byte, and writes none to disk."""
    with _telling(url):
        store = Store(url)
        content, _ = head.read(store)
        steps = _steps(content)
        entries: list[dict[str, Any]] = []
        for number in _chosen(url, list(steps), step):
            problems = []
            place = steps[number]["place"]
            try:
                for part in transfer.parts_of(transfer.fetch_manifest(store, number, place)[1]):
                    try:
                        transfer.good(store, place, part)
                    except ValueError as error:
                        problems.append(str(error))
            except ValueError as error:
                problems.append(str(error))
            entries.append({"step": number, "committed": True, "intact": not problems, "problems": problems})
        if step is None:
            entries += [
                {"step": number, "committed": False, "intact": False, "problems": [CUT_OFF]}
                for number in _unfinished(store, content)
            ]
        return {"path": store.url, "steps": sorted(entries, key=lambda e: (e["step"], e["committed"]))}


def refuse_if_taken(url: str, path: Path) -> None:
    """Raise now what taking the lease would; waits for a sign of an owner that may be dead. All processes together.

    Raises:
        CheckpointError: another run has it, or the store refuses us. RunError: no answer.
    """

    def look() -> None:
        with _telling(url):
            head.wait_for(Store(url), head.known_name(local(path)))

    agreement.on_first(look)


@contextlib.contextmanager
def _telling(url: str) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise refusal(url, error) from error


def _steps(content: head.Content) -> dict[int, dict[str, Any]]:
    return {
        int(step): entry for step, entry in sorted(content["steps"].items(), key=lambda pair: int(pair[0]))
    }


def _unfinished(store: Store, content: head.Content) -> list[int]:
    """Steps of which something is there, and that no head names."""
    named = {entry["place"] for kind in ("steps", "aside") for entry in content[kind].values()}
    places = {key.partition("/")[0] for key in store.names()} - named
    return sorted(int(found[1]) for place in places if (found := head.PLACE.fullmatch(place)))


def _chosen(url: str, found: list[int], step: int | None) -> list[int]:
    if not found or (step is not None and step not in found):
        raise CheckpointError(
            "no checkpoint here" if step is None else f"no step {step} here",
            where=url,
            why=f"steps: {', '.join(map(str, found)) or 'none'}",
            fix="check the URL" if not found else "choose one of them",
        )
    return found if step is None else [step]
