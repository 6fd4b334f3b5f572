"""Routing, capacity and the exchange of tokens against a plain loop over tokens, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from shardtrain.parallel import expert
from shardtrain.parallel.expert import AXIS, expert_mlp
from shardtrain.parallel.routing import balance_loss, capacity, load, places, route, scores_of

ROWS, LENGTH, D, F, E, K = 2, 24, 8, 12, 8, 3
T = ROWS * LENGTH
FACTORS = [0.0, 0.5, 1.25, 8.0]
SKEWS = ["even", "one", "empty", "ties", "all ties"]


def logits(skew, seed):
    random = np.random.default_rng(seed)
    made = random.normal(size=(T, E)).astype(np.float32)
    if skew == "one":
        made[:, seed % E] += 50
    if skew == "empty":
        made[:, random.permutation(E)[: E - K]] -= 50
    if skew == "ties":
        made = np.round(made)
    if skew == "all ties":
        made[:] = 0.5
    return made


def values(seed=0):
    random = np.random.default_rng(seed)
    make = lambda *shape: random.normal(size=shape).astype(np.float32)
    return make(ROWS, LENGTH, D), make(E, D, 2, F) / 3, make(E, F, D) / 3


def kept_choices(chosen, most):
    """Which choices an expert keeps: a loop in the order of the tokens."""
    taken, kept = [0] * E, np.zeros(chosen.shape, bool)
    for t in range(len(chosen)):
        for j, e in enumerate(chosen[t]):
            kept[t, j] = not most or taken[e] < most
            taken[e] += 1
    return kept


def reference(x, chosen, weights, gate_up, down, kept):
    """Every expert on every token, in float32, under jit and grad."""
    both = jnp.einsum("btd,edcf->btecf", x, gate_up)
    each = jnp.einsum("btef,efd->bted", jax.nn.silu(both[..., 0, :]) * both[..., 1, :], down)
    share = (jax.nn.one_hot(chosen, E) * jnp.where(kept, weights, 0)[..., None]).sum(1)
    return jnp.einsum("bted,bte->btd", each, share.reshape(ROWS, LENGTH, E))


@functools.partial(jax.jit, static_argnames=("factor", "score"))
def ours(logits, x, gate_up, down, factor, score="softmax", bias=None):
    chosen, weights = route(logits, K, score=score, bias=bias)
    y, dropped = expert_mlp(x, chosen, weights, gate_up, down, experts=E, factor=factor)
    return y, dropped, chosen, weights


def by_hand(logits, k):
    """Best first, the lower index where scores are equal."""
    return np.stack([sorted(range(E), key=lambda e: (-row[e], e))[:k] for row in logits])


@pytest.mark.parametrize("skew", SKEWS)
def test_the_best_are_chosen(skew):
    """And ties go to the lower index. The fault in mind: an unstable sort."""
    made = logits(skew, 3)
    chosen, weights = route(made, K)
    np.testing.assert_array_equal(chosen, by_hand(np.asarray(scores_of(made, "softmax")), K))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    picked = np.take_along_axis(made, np.asarray(chosen), 1)
    np.testing.assert_allclose(weights, jax.nn.softmax(picked), rtol=1e-5)


def test_a_bias_selects_and_does_not_weigh():
    """The weights are those of the scores alone, and so is their gradient. Failed once with biased weights."""
    made, bias = logits("even", 0), jnp.zeros(E).at[5].set(10.0)
    run = lambda made, bias: route(made, K, score="sigmoid", bias=bias)
    chosen, weights = run(made, bias)
    assert (chosen[:, 0] == 5).all()
    scores = np.take_along_axis(np.asarray(jax.nn.sigmoid(made)), np.asarray(chosen), 1)
    np.testing.assert_allclose(weights, scores / scores.sum(-1, keepdims=True), rtol=1e-6)
    assert not jax.grad(lambda b: run(made, b)[1][:, 1].sum())(bias).any()


def test_balance_is_one_where_all_are_alike():
    """And grows with the skew. The fault in mind: choices counted k times."""
    scores = lambda skew: scores_of(logits(skew, 0), "softmax")
    even = jnp.arange(T)[:, None] * K % E + jnp.arange(K)
    assert balance_loss(scores("all ties"), even % E) == pytest.approx(1, rel=1e-6)
    assert balance_loss(scores("one"), route(logits("one", 0), K)[0]) > 1.5


@pytest.mark.parametrize("most", [0, 1, 7])
@pytest.mark.parametrize("skew", SKEWS)
def test_places_are_given_in_the_order_of_tokens(skew, most):
    """Each place holds the choice that has it, and experts keep their first. Failed once with choices by their rank."""
    chosen = by_hand(logits(skew, 1), K)
    to = jax.tree.map(np.asarray, places(jnp.asarray(chosen), E, most))
    np.testing.assert_array_equal(to.sizes, np.bincount(chosen.ravel(), minlength=E))
    held = to.place.ravel() < len(to.choice)
    np.testing.assert_array_equal(held.reshape(T, K), kept_choices(chosen, most))
    np.testing.assert_array_equal(to.choice[to.place.ravel()[held]], np.flatnonzero(held))
    assert (to.choice < T * K).sum() == held.sum()
    if most:
        np.testing.assert_array_equal(to.place.ravel()[held] // most, chosen.ravel()[held])


def test_capacity():
    """The formula, and never more than there are tokens."""
    assert [capacity(48, 3, 8, f) for f in (0.5, 1.0, 1.25, 8.0)] == [9, 18, 23, 48]


@pytest.mark.parametrize("factor", FACTORS)
def test_the_sum_over_choices(factor):
    """Whatever the skew, the values and the number of drops are those of a loop. The fault in mind: an empty expert
    whose rows are another's."""
    x, gate_up, down = values()
    most = capacity(T, K, E, factor) if factor else 0
    for seed in range(4):
        for skew in SKEWS:
            y, dropped, chosen, weights = ours(logits(skew, seed), x, gate_up, down, factor)
            kept = kept_choices(np.asarray(chosen), most)
            assert dropped == (~kept).sum(), (skew, seed)
            np.testing.assert_allclose(
                y, reference(x, chosen, weights, gate_up, down, kept), atol=2e-5, err_msg=f"{skew} {seed}"
            )


def gradients(function, skew, factor):
    """Of a scalar of the output with respect to logits, x and the kernels."""
    x, gate_up, down = values(1)
    probe = np.cos(np.arange(T * D)).reshape(ROWS, LENGTH, D)
    objective = lambda *args: (function(*args, factor) * probe).sum()
    return jax.jit(jax.grad(objective, argnums=(0, 1, 2, 3)))(logits(skew, 2), x, gate_up, down)


def dense(made, x, gate_up, down, factor):
    most = capacity(T, K, E, factor) if factor else T
    chosen, weights = route(made, K)
    flat = jax.nn.one_hot(chosen.reshape(-1), E, dtype=int)
    kept = ((jnp.cumsum(flat, 0) * flat).sum(-1) <= most).reshape(T, K)
    return reference(x, chosen, weights, gate_up, down, kept)


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.linalg.norm(y) or 1.0
        assert np.linalg.norm(np.float64(x) - np.float64(y)) <= tolerance * scale


@pytest.mark.parametrize("factor", [0.0, 0.5])
@pytest.mark.parametrize("skew", ["even", "one", "empty"])
def test_gradients_are_those_of_the_dense_reference(skew, factor):
    """Of the router, the tokens and the experts. Failed once without the weights' gradient."""
    run = lambda *args: ours(*args)[0]
    close(gradients(run, skew, factor), gradients(dense, skew, factor))


def drops_an_expert(true, x, chosen, weights, gate_up, down, **options):
    return true(x, chosen, jnp.where(chosen == 3, 0, weights), gate_up, down, **options)


def permutes_weights(true, x, chosen, weights, gate_up, down, **options):
    return true(x, chosen, jnp.roll(weights, 1, 1), gate_up, down, **options)


def permutes_experts(true, x, chosen, weights, gate_up, down, **options):
    return true(x, chosen, weights, gate_up, jnp.roll(down, 1, 0), **options)


@pytest.mark.parametrize("fault", [drops_an_expert, permutes_weights, permutes_experts])
def test_faults_are_seen(fault):
    """Planted here, each is far from the reference."""
    x, gate_up, down = map(jnp.asarray, values())
    chosen, weights = route(logits("even", 0), K)
    y, _ = fault(expert_mlp, x, chosen, weights, gate_up, down, experts=E, factor=0.0)
    right = reference(x, chosen, weights, gate_up, down, np.ones((T, K), bool))
    assert np.linalg.norm(y - right) > 1e-2 * np.linalg.norm(right)


# --- eight devices ------------------------------------------------------------------------------------


def groups(skews):
    """One group for each of eight devices: logits [8*T, E], x [8*ROWS, ...], and the kernels."""
    _, gate_up, down = values()
    made = np.concatenate([logits(skews[g % len(skews)], g) for g in range(8)])
    return made, np.concatenate([values(g)[0] for g in range(8)]), gate_up, down


@functools.cache
def exchanged(n, factor, ragged=False):
    """Values, drops, choices and gradients with E/n experts a device, one group each."""
    mesh = jax.make_mesh((8 // n, n), ("data", AXIS), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, held = P(("data", AXIS)), P(AXIS)

    def local(made, x, gate_up, down):
        def objective(made, x, gate_up, down):
            chosen, weights = route(made, K)
            y, dropped = expert_mlp(x, chosen, weights, gate_up, down, experts=E, factor=factor)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), (y, dropped[None], chosen)

        kernels = [jax.lax.pcast(a, "data", to="varying") for a in (gate_up, down)]
        value = jax.value_and_grad(objective, argnums=(0, 1, 2, 3), has_aux=True)
        (_, out), (of_made, of_x, *of_kernels) = value(made, x, *kernels)
        return out, of_made, of_x, jax.lax.psum(of_kernels, "data")

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, rows, held, held),
            out_specs=((rows, rows, rows), rows, rows, [held, held]),
        )
    )


@functools.cache
def alone(factor):
    """The same groups one after the other on one device."""

    def one(made, x, gate_up, down):
        def objective(made, x, gate_up, down):
            chosen, weights = route(made, K)
            y, dropped = expert_mlp(x, chosen, weights, gate_up, down, experts=E, factor=factor)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), (y, dropped[None], chosen)

        (_, out), gradients = jax.value_and_grad(objective, argnums=(0, 1, 2, 3), has_aux=True)(
            made, x, gate_up, down
        )
        return out, *gradients

    def run(made, x, gate_up, down):
        xs = (made.reshape(8, T, E), x.reshape(8, ROWS, LENGTH, D))
        out, of_made, of_x, *of_kernels = jax.lax.map(lambda g: one(*g, gate_up, down), xs)
        flat = lambda tree: jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)
        return flat(out), flat(of_made), flat(of_x), [a.sum(0) for a in of_kernels]

    return jax.jit(run)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.25])
@pytest.mark.parametrize("n", [2, 8])
def test_the_exchange_changes_nothing(n, factor):
    """Choices and drops bit for bit, values and gradients to rounding. The fault in mind: rows of another sender."""
    for skews in (["even"], ["one"], SKEWS):
        given = groups(skews)
        (y, dropped, chosen), *gradients = exchanged(n, factor)(*given)
        (y1, dropped1, chosen1), *gradients1 = alone(factor)(*given)
        np.testing.assert_array_equal(chosen, chosen1)
        np.testing.assert_array_equal(dropped, dropped1)
        close(y, y1)
        close(gradients, gradients1)


def in_python(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` says it does, by gathering everything."""
    every = [jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    me, row = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    for sender in range(jax.lax.axis_size(axis_name)):
        rows, begin, size, land = (a[sender] for a in every)
        offset = row - land[me]
        inside = (offset >= 0) & (offset < size[me])
        output = jnp.where(inside[:, None], rows[jnp.where(inside, begin[me] + offset, 0)], output)
    return output


def test_the_ragged_exchange(monkeypatch):
    """The way of TPU and GPU, with the collective in its stead: the same rows. The fault in mind: offsets of the sender
    where those of the receiver belong."""
    monkeypatch.setattr(expert, "_has_ragged", lambda: True)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", in_python)
    given = groups(SKEWS)
    close(exchanged(4, 0.0, ragged=True)(*given), alone(0.0)(*given))


def test_load_counts_every_choice():
    chosen = by_hand(logits("ties", 0), K)
    np.testing.assert_array_equal(load(jnp.asarray(chosen), E), np.bincount(chosen.ravel(), minlength=E))
