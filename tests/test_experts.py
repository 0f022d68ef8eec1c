"""Routing, grouped products and the two forms of a mixture of experts, against loops over tokens; who is dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, assert_close

from llm_jax.kernels.exchange import sort_by_group
from llm_jax.kernels.experts import Bank, capacity, dropless, grouped_product, room, route
from llm_jax.sharding import Layout

# ------------------------------------------------------------------------------------------------ routing

LOG = np.log(np.array([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5], [0.9, 0.05, 0.05]]]))  # one row of four
PADDED = np.array([[1, 1, 2, 0]])


def test_tokens_go_to_their_likeliest_experts_and_padding_to_none(x64):
    weights, experts, _ = route(jnp.asarray(LOG + 7.0), jnp.asarray(PADDED), 2, renormalize=False)
    assert experts.tolist() == [[[0, 1], [1, 0], [2, 0], [3, 3]]]  # of equals the first; 3 is no expert
    np.testing.assert_allclose(weights, [[[0.5, 0.3], [0.8, 0.1], [0.5, 0.25], [0, 0]]])
    weights, again, _ = route(jnp.asarray(LOG), jnp.asarray(PADDED), 2, renormalize=True)
    assert again.tolist() == experts.tolist() and experts.dtype == jnp.int32
    np.testing.assert_allclose(weights, [[[5 / 8, 3 / 8], [8 / 9, 1 / 9], [2 / 3, 1 / 3], [0, 0]]])


def test_statistics_of_a_row(x64):
    """f and P over the three real tokens: choices fall 3, 2, 1 of 6; probabilities add up to 0.85, 1.35, 0.8."""
    shifts = np.array([1.0, 2.0, -3.0, 50.0]).reshape(1, 4, 1)
    _, _, routing = route(jnp.asarray(LOG + shifts), jnp.asarray(PADDED), 2, renormalize=True)
    share, mean = np.array([3, 2, 1]) / 6, np.array([0.85, 1.35, 0.8]) / 3
    np.testing.assert_allclose(routing.balance, [3 * 3 * (share * mean).sum()])
    np.testing.assert_allclose(routing.z, [1.0 + 4.0 + 9.0])
    assert routing.dropped.tolist() == [0]


def test_an_even_router_has_balance_one_a_token_and_a_collapsed_one_as_many_as_experts(x64):
    even = jnp.zeros((1, 5, 4))
    assert float(route(even, None, 4, renormalize=True)[2].balance[0]) == pytest.approx(5)
    collapsed = jnp.broadcast_to(jnp.array([100.0, 0, 0, 0]), (1, 5, 4))
    assert float(route(collapsed, None, 1, renormalize=True)[2].balance[0]) == pytest.approx(20)


def test_statistics_belong_to_their_row_and_a_row_of_padding_has_none(x64):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 4)))
    segments = jnp.asarray([[1] * 6, [1, 1, 1, 2, 2, 0], [0] * 6])
    statistics = jax.jit(lambda *rows: route(*rows, 2, renormalize=True)[2], compiler_options=QUICK)
    together, alone = statistics(logits, segments), [statistics(logits[i, None], segments[i, None]) for i in range(3)]
    for name in ("balance", "z"):
        np.testing.assert_array_equal(getattr(together, name), [float(getattr(r, name)[0]) for r in alone])
        assert getattr(together, name)[2] == 0


def test_the_balance_loss_pulls_probability_from_the_busy_expert(x64):
    balance = lambda logits: route(logits, None, 1, renormalize=False)[2].balance.sum()  # noqa: E731
    gradient = jax.grad(balance)(jnp.asarray(LOG))[0].sum(0)
    assert gradient[0] > 0 > gradient[2]


# ------------------------------------------------------------------------- other scores, groups, balance bias


def route_by_loops(logits, top_k, *, renormalize, scores="softmax", groups=1, top_groups=1, scale=1.0, bias=None):
    """DeepSeek's choice for one token after the other (arXiv 2405.04434, section 2.2.2; 2412.19437, section 2.1.2)."""
    experts, weights = np.zeros((*logits.shape[:2], top_k), int), np.zeros((*logits.shape[:2], top_k))
    for place in np.ndindex(logits.shape[:2]):
        exp = np.exp(logits[place])
        score = exp / exp.sum() if scores == "softmax" else exp / (1 + exp)
        ranked = score + (0 if bias is None else bias)
        members = np.split(np.arange(len(score)), groups)
        best = [np.sort(ranked[m])[::-1][: 1 if scores == "softmax" else 2].sum() for m in members]
        within = np.concatenate([members[g] for g in np.argsort(best)[::-1][:top_groups]]) if groups > 1 else members[0]
        chosen = sorted(within, key=lambda e: -ranked[e])[:top_k]
        experts[place], found = chosen, score[chosen]
        weights[place] = scale * (found / found.sum() if renormalize else found)
    return weights, experts


BIAS = np.array([0.3, -0.2, 0.1, 0.0, -0.4, 0.2, 0.25, -0.1])
ROUTERS = {
    "V2-Lite": dict(renormalize=False),
    "V2": dict(renormalize=False, groups=4, top_groups=2, scale=16.0),
    "V3": dict(renormalize=True, scores="sigmoid", groups=4, top_groups=2, scale=2.5, bias=BIAS),
    "V3, one group": dict(renormalize=True, scores="sigmoid", bias=BIAS),
    "sigmoid alone": dict(renormalize=False, scores="sigmoid", groups=2, top_groups=1),
    "softmax with a bias": dict(renormalize=True, groups=2, top_groups=1, bias=BIAS),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_choose_as_loops_over_tokens_do(x64, name):
    settings = dict(ROUTERS[name])
    logits = 2 * np.random.default_rng(3).normal(size=(3, 7, 8))
    expected = route_by_loops(logits, 3, **settings)
    settings["balance_bias"] = settings.pop("bias", None)
    weights, experts, _ = route(jnp.asarray(logits), None, 3, **settings)
    np.testing.assert_array_equal(experts, expected[1])
    np.testing.assert_allclose(weights, expected[0], rtol=1e-12)


def test_a_balance_bias_changes_who_is_chosen_and_no_weight(x64):
    logits = jnp.asarray(LOG[:, :1])  # 0.5, 0.3, 0.2
    chosen = lambda bias: route(logits, None, 1, renormalize=False, balance_bias=jnp.asarray(bias))[:2]  # noqa: E731
    weights, experts = chosen([0.0, 0.25, 0.0])
    assert experts.tolist() == [[[1]]]
    np.testing.assert_allclose(weights, [[[0.3]]])
    assert chosen([0.0, 0.15, 0.0])[1].tolist() == [[[0]]]


def test_the_pull_on_a_balance_bias_is_its_load_above_the_mean(x64):
    """Choices of real tokens fall 3, 2 and 1: E * load - sum of loads. The value is 0, and logits are free of it."""

    def pull(bias, logits):
        routing = route(logits, jnp.asarray(PADDED), 2, renormalize=True, balance_bias=bias)[2]
        return routing.pull.sum()

    value, (bias, logits) = jax.value_and_grad(pull, argnums=(0, 1))(jnp.zeros(3), jnp.asarray(LOG))
    assert value == 0 and bias.tolist() == [3 * 3 - 6, 3 * 2 - 6, 3 * 1 - 6]
    assert not logits.any()
    rows = jax.grad(lambda bias: pull(bias, jnp.asarray(LOG)) * 0.5)(jnp.ones(3))
    assert rows.tolist() == [1.5, 0.0, -1.5]
    assert route(jnp.asarray(LOG), None, 2, renormalize=True)[2].pull is None


def test_the_balance_loss_of_sigmoid_scores_takes_their_shares(x64):
    """arXiv 2412.19437, equations 17 to 20, of the three real tokens."""
    logits = np.random.default_rng(4).normal(size=(1, 4, 3))
    score = 1 / (1 + np.exp(-logits))
    _, experts, routing = route(jnp.asarray(logits), jnp.asarray(PADDED), 2, renormalize=True, scores="sigmoid")
    share = (score / score.sum(-1, keepdims=True))[0, :3].mean(0)
    load = np.bincount(np.asarray(experts)[0, :3].ravel(), minlength=3) * 3 / (2 * 3)
    np.testing.assert_allclose(routing.balance, [3 * (load * share).sum()])


# ------------------------------------------------------------------------------------------------ grouped products


def draw_groups(seed=0, size=7):
    rng = np.random.default_rng(seed)
    counts = np.array([[2, 0, 3], [0, 0, size]][seed % 2], np.int32)
    return rng.normal(size=(size, 4)), rng.normal(size=(3, 4, 5)), jnp.asarray(counts), rng.normal(size=(size, 5))


def looped(x, matrices, counts):
    y, end = np.zeros((len(x), matrices.shape[2])), 0
    for matrix, count in zip(matrices, np.asarray(counts), strict=True):
        y[end : end + count] = x[end : end + count] @ matrix
        end += count
    return y


def pulled(x, matrices, counts, dy):
    y, pull = jax.vjp(lambda *args: grouped_product(*args, counts), x, matrices)
    return y, *pull(dy)


@pytest.mark.parametrize("seed", [0, 1])
def test_each_group_meets_its_matrix_and_rows_of_no_group_are_zero(x64, seed):
    x, matrices, counts, dy = draw_groups(seed)
    y, dx, dmatrices = pulled(x, matrices, counts, dy)
    np.testing.assert_allclose(y, looped(x, matrices, counts), atol=1e-12)
    np.testing.assert_allclose(dx, looped(dy, matrices.swapaxes(1, 2), counts), atol=1e-12)
    ends = np.cumsum(counts)
    for matrix, end, count in zip(dmatrices, ends, counts, strict=True):
        rows = slice(int(end - count), int(end))
        np.testing.assert_allclose(matrix, x[rows].T @ dy[rows], atol=1e-12)


def test_grouped_products_can_be_mapped_before_and_after_differentiation(x64):
    stacked = [np.stack(arrays) for arrays in zip(draw_groups(0), draw_groups(1), strict=True)]
    expected = [np.stack(arrays) for arrays in zip(*(pulled(*draw_groups(seed)) for seed in (0, 1)), strict=True)]
    after = jax.vmap(pulled)(*stacked)
    x, matrices, counts, dy = stacked
    y, pull = jax.vjp(lambda x, m: jax.vmap(grouped_product)(x, m, counts), x, matrices)
    for found in (after, (y, *pull(dy))):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_sorting_keeps_order_within_a_group_and_puts_what_has_none_last():
    found = sort_by_group(jnp.array([2, 0, 3, 2, 0, 3]), 3)  # 3: none
    assert found.order.tolist() == [1, 4, 0, 3, 2, 5]
    assert found.place.tolist() == [2, 0, 4, 3, 1, 5]
    assert found.counts.tolist() == [2, 0, 2]


# ------------------------------------------------------------------------------------------------ the whole layer

ROWS, LENGTH, EXPERTS, EMBED, WIDTH = 2, 6, 4, 3, 5
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0]])


def gated(up, gate):
    return jax.nn.silu(gate) * up


def ungated(up, gate):
    assert gate is None
    return jax.nn.relu(up)


def draw_layer(seed=0, biases=False, gate=True):
    rng = np.random.default_rng(seed)
    wide, narrow = (EXPERTS, EMBED, WIDTH), (EXPERTS, WIDTH, EMBED)
    bank = Bank(rng.normal(size=wide), rng.normal(size=narrow), rng.normal(size=wide) if gate else None)
    if biases:
        bank = bank._replace(up_bias=rng.normal(size=wide[::2]), down_bias=rng.normal(size=narrow[::2]))
        bank = bank._replace(gate_bias=rng.normal(size=wide[::2]) if gate else None)
    return rng.normal(size=(ROWS, LENGTH, EMBED)), rng.normal(size=(ROWS, LENGTH, EXPERTS)), bank


def mlp(x, bank, e, activation):
    def linear(x, kernel, bias):
        y = jnp.einsum("...d,df->...f", x, kernel[e])
        return y if bias is None else y + jnp.broadcast_to(bias[e], y.shape)

    gate = None if bank.gate is None else linear(x, bank.gate, bank.gate_bias)
    return linear(activation(linear(x, bank.up, bank.up_bias), gate), bank.down, bank.down_bias)


def by_loops(x, weights, experts, bank, activation, keep):
    """Every token through each of its experts, one after the other, summed up in numpy."""
    y = np.zeros(x.shape)
    for b, t, choice in np.ndindex(experts.shape):
        e = int(experts[b, t, choice])
        if e < EXPERTS and keep[b, t, choice]:
            y[b, t] += weights[b, t, choice] * mlp(x[b, t], bank, e, activation)
    return y


def dense(x, weights, experts, bank, activation, keep):
    """The same with every token through every expert, which can be differentiated in no time."""
    shares = jnp.where(keep[..., None] & jax.nn.one_hot(experts, EXPERTS, dtype=bool), weights[..., None], 0).sum(2)
    return sum(shares[..., e, None] * mlp(x, bank, e, activation) for e in range(EXPERTS))


def kept_by_loops(experts, size):
    """First choices of all tokens, then second ones; each takes a seat where there is one."""
    keep = np.zeros(experts.shape, bool)
    for b in range(len(experts)):
        seats = [size] * EXPERTS
        for choice in range(experts.shape[2]):
            for t in range(experts.shape[1]):
                e = int(experts[b, t, choice])
                if e < EXPERTS and seats[e]:
                    seats[e] -= 1
                    keep[b, t, choice] = True
    return keep


LAYERS = {
    "gated": (dict(), gated, 2),
    "gated, biases": (dict(biases=True), gated, 2),
    "ungated, biases": (dict(biases=True, gate=False), ungated, 2),
    "one choice": (dict(), gated, 1),
    "all experts": (dict(), gated, EXPERTS),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("factor", [0, 0.5, 1.0])
def test_output_and_gradients_are_those_of_loops(x64, name, factor):
    """Factor 0: dropless. Gradients of x, router logits and all parameters, packed, with padding."""
    options, activation, k = LAYERS[name]
    x, logits, bank = draw_layer(**options)
    dy = np.random.default_rng(1).normal(size=x.shape)
    weights, experts = (np.asarray(a) for a in route(logits, SEGMENTS, k, renormalize=True)[:2])
    keep = kept_by_loops(experts, room(LENGTH, EXPERTS, k, factor) if factor else LENGTH)

    def run(layer):
        def loss(x, logits, bank):
            weights, experts, _ = route(logits, SEGMENTS, k, renormalize=True)
            y, dropped = layer(x, weights, experts, bank, activation)
            return (y * dy).sum(), (y, dropped)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)

    def reference(*args):
        return dense(*args, keep), ((experts < EXPERTS) & ~keep).sum((1, 2))

    def layer(*args):
        if factor:
            return capacity(*args, Layout(), factor=factor)
        return dropless(*args, Layout()), jnp.zeros(ROWS, int)

    found = run(layer)(x, logits, bank)
    assert_close(found, run(reference)(x, logits, bank), atol=1e-12)
    y, dropped = found[0][1]
    np.testing.assert_allclose(y, by_loops(x, weights, experts, bank, activation, keep), atol=1e-12)
    if factor == 0.5:
        assert dropped.sum() > 0  # else nothing was asked


def test_padding_takes_no_part(x64):
    """Whatever stands there, real tokens, statistics and who is dropped stay as they are; its output is 0."""
    x, logits, bank = draw_layer()
    real = (SEGMENTS != 0)[..., None]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(x, logits):
        weights, experts, routing = route(logits, SEGMENTS, 2, renormalize=True)
        return (
            dropless(x, weights, experts, bank, gated, Layout()),
            *capacity(x, weights, experts, bank, gated, Layout(), factor=0.7),
            routing,
        )

    plain = run(x, logits)
    other = run(np.where(real, x, 1e9), np.where(real, logits, 1e3))
    assert_close(other, plain)
    assert not np.where(real, 0, plain[0]).any() and not np.where(real, 0, plain[1]).any()


# ------------------------------------------------------------------------------------------------ capacity

SEATED = jnp.asarray([[[0, 1], [0, 1], [1, 0], [0, 2]]], jnp.int32)  # of 3 experts; room for two each


def multiply_by_hundreds():
    """Expert e gives 10^e times what it gets."""
    scale = jnp.array([1.0, 10.0, 100.0]).reshape(3, 1, 1)
    return Bank(up=scale, down=jnp.ones((3, 1, 1)))


def test_first_choices_come_first_then_earlier_tokens(x64):
    """Expert 0: tokens 0 and 1, not 3 (late) nor 2 (second choice). Expert 1: 2 (first choice), then 0, not 1."""
    assert room(4, 3, 2, 0.75) == 2
    x, weights = jnp.ones((1, 4, 1)), jnp.ones((1, 4, 2))
    y, dropped = capacity(x, weights, SEATED, multiply_by_hundreds(), ungated, Layout(), factor=0.75)
    assert y[0, :, 0].tolist() == [11, 1, 10, 100]
    assert dropped.tolist() == [3]


def test_who_is_earlier_is_a_matter_of_place_not_of_the_array(x64):
    order = np.array([2, 0, 3, 1])
    x, weights = jnp.ones((1, 4, 1)), jnp.ones((1, 4, 2))
    y, dropped = capacity(
        x, weights, SEATED[:, order], multiply_by_hundreds(), ungated, Layout(), factor=0.75, places=jnp.asarray(order)
    )
    assert y[0, :, 0].tolist() == np.array([11, 1, 10, 100])[order].tolist()
    assert dropped.tolist() == [3]


@pytest.mark.parametrize(
    ("length", "num_experts", "top_k", "factor", "expected"),
    [(4, 3, 2, 0.75, 2), (8, 4, 2, 1.0, 4), (8, 4, 2, 1.25, 5), (8, 3, 1, 1.0, 3), (1, 8, 2, 1.25, 1), (8, 2, 2, 9, 8)],
)  # fmt: skip
def test_room_is_rounded_up_and_never_more_than_the_row(length, num_experts, top_k, factor, expected):
    assert room(length, num_experts, top_k, factor) == expected
