"""Text from a language model, one token at a time, with cached keys and values."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shardtrain.errors import ConfigError
from shardtrain.models.language import LanguageModel


def generate(
    model: LanguageModel,
    prompt: Any,
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    stop: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Continue a prompt.

    Args:
        model: as `plan.model(state)` gives it.
        prompt: token ids [length] or [batch, length], at least one.
        tokens: how many to add.
        temperature: 0 takes the likeliest token.
        top_k: choose among the k likeliest; 0 among all.
        stop: a token after which only itself follows.

    Returns:
        int32 [batch, length + tokens] (or without the batch), prompt included.
    """
    ids = np.atleast_2d(np.asarray(prompt, np.int32))
    if ids.shape[1] == 0:
        raise ConfigError("the prompt has no tokens", where="generate", fix="a prompt of at least one token")
    length = ids.shape[1] + tokens
    limit = getattr(getattr(model, "config", None), "sequence", length)
    if length > limit:
        raise ConfigError(
            f"{ids.shape[1]} tokens of prompt and {tokens} new ones, the model has {limit} positions",
            where="generate",
            fix=f"at most {max(0, limit - ids.shape[1])} new tokens, or a shorter prompt",
        )
    graph, state = nnx.split(model)
    run = functools.partial(_run, graph, tokens, float(temperature), top_k, -1 if stop is None else stop)
    out = np.asarray(jax.jit(run)(state, jnp.asarray(ids), jax.random.key(seed)))
    full = np.concatenate([ids, out], 1)
    return full[0] if np.ndim(prompt) == 1 else full


def _run(
    graph: Any,
    tokens: int,
    temperature: float,
    top_k: int,
    stop: int,
    state: Any,
    ids: jax.Array,
    key: jax.Array,
) -> jax.Array:
    model = nnx.merge(graph, state)
    batch, length = ids.shape
    cache = model.empty_cache(batch, length + tokens)

    def pick(x_BD: jax.Array, key: jax.Array, before: jax.Array) -> jax.Array:
        logits = model.logits(x_BD[:, None])[:, 0]
        if top_k:
            least = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        drawn = jax.random.categorical(key, logits / temperature) if temperature > 0 else None
        token = logits.argmax(-1) if drawn is None else drawn
        return jnp.where(before == stop, stop, token).astype(jnp.int32)

    x, cache = model.hidden(ids, cache=cache)
    keys = jax.random.split(key, tokens)
    first = pick(x[:, -1], keys[0], jnp.full((batch,), -2))

    def body(carry: Any, step: Any) -> tuple[Any, jax.Array]:
        token, cache = carry
        key, position = step
        x, cache = model.hidden(token[:, None], cache=cache, position=position)
        new = pick(x[:, 0], key, token)
        return (new, cache), token

    (last, _), rest = jax.lax.scan(body, (first, cache), (keys[1:], length + jnp.arange(tokens - 1)))
    return jnp.concatenate([rest.T, last[:, None]], 1)
