"""Cross-entropy in pieces of the length: numbers and gradients of the plain form, on any mesh, never all the logits."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tiny import QUICK, assert_close, mesh_layout

from llm_jax.kernels.cross_entropy import chunked_cross_entropy, cross_entropy
from llm_jax.sharding import ACTIVATION_RULES, Layout, change_rules

ROWS, LENGTH, FEATURES, VOCAB = 4, 13, 6, 16
FORMS = {
    "plain": {},
    "smoothing": dict(label_smoothing=0.1),
    "softcap": dict(softcap=2.0),
    "padded vocabulary": dict(vocab_size=11),
    "all": dict(label_smoothing=0.1, softcap=2.0, vocab_size=11),
}


def plain_cross_entropy(x, head, targets, *, label_smoothing=0.0, softcap=0.0, vocab_size=None):
    """The same from all the logits at once."""
    logits = jnp.matmul(x, head.astype(x.dtype), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if vocab_size is not None:
        logits = jnp.where((jnp.arange(head.shape[1]) < vocab_size)[None, None], logits, -jnp.inf)
    return *cross_entropy(logits, targets, label_smoothing), logits.argmax(-1) == targets


def with_gradients(function, **form):
    """(x, head, targets, weights) to the three results and the gradients of weighted loss plus z-loss."""

    def total(x, head, targets, weights):
        loss, log_z, correct = function(x, head, targets, **form)
        return (weights[0] * loss + weights[1] * jnp.square(log_z)).sum(), (loss, log_z, correct)

    return jax.value_and_grad(total, (0, 1), has_aux=True)


def run(function, *arrays, **form):
    return jax.jit(with_gradients(function, **form), compiler_options=QUICK)(*arrays)


def numbers(rows=ROWS, length=LENGTH, features=FEATURES, vocab=VOCAB, dtype=np.float64):
    """x, head, targets below 11, and a weight for each loss and each z-loss."""
    rng = np.random.default_rng(0)
    x, head = rng.normal(size=(rows, length, features)), rng.normal(size=(features, vocab))
    targets, weights = rng.integers(0, 11, (rows, length)).astype(np.int32), rng.random((2, rows, length))
    return jnp.asarray(x, dtype), jnp.asarray(head, dtype), jnp.asarray(targets), jnp.asarray(weights)


@functools.cache
def expected(name):
    return jax.tree.map(np.asarray, run(plain_cross_entropy, *numbers(), **FORMS[name]))


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize("name", FORMS)
def test_pieces_give_the_numbers_of_the_whole(x64, name, chunk):
    """In float64 to 1e-12: loss, log Z, correct and the gradients of x and head; 13 is no multiple of 5."""
    found = run(chunked_cross_entropy, *numbers(), chunk=chunk, **FORMS[name])
    assert 0 < found[0][1][2].sum() < ROWS * LENGTH
    assert_close(found, expected(name), atol=1e-12)


def test_literal_logits(x64):
    """With the identity as head, x are the logits; of equal ones the first is the likeliest."""
    logits = jnp.array([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 2.0, 3.0]]])
    loss, log_z, correct = chunked_cross_entropy(logits, jnp.eye(3), jnp.array([[0, 1, 2]]), chunk=2)
    np.testing.assert_allclose(log_z[0], np.log(np.exp(logits[0]).sum(-1)), rtol=1e-14)
    np.testing.assert_allclose(loss[0], log_z[0] - np.array([1.0, 1.0, 3.0]), rtol=1e-12)
    assert correct.tolist() == [[True, False, True]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_inputs(dtype):
    """Results are float32; gradients have the dtypes of x and head and are close to those of the plain form."""
    x, head, targets, weights = numbers(dtype=dtype)
    found = run(chunked_cross_entropy, x, head, targets, weights, chunk=4, **FORMS["all"])
    plain = run(plain_cross_entropy, x, head, targets, weights, **FORMS["all"])
    (_, (loss, log_z, _)), (d_x, d_head) = found
    assert loss.dtype == log_z.dtype == jnp.float32 and d_x.dtype == d_head.dtype == dtype
    as_float32 = lambda tree: jax.tree.map(lambda y: np.asarray(y, np.float32), tree)  # noqa: E731
    assert_close(as_float32(found[0]), as_float32(plain[0]), atol=1e-6)
    assert_close(as_float32(found[1]), as_float32(plain[1]), atol=1e-5 if dtype == "float32" else 2**-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_the_head_is_summed_in_float32(dtype):
    """2048 tokens of 1/2 each: a sum in bfloat16 would stay at 128. The head may be wider than x."""
    x, head = jnp.ones((1, 2048, 1), jnp.bfloat16), jnp.zeros((1, 2), dtype)
    total = lambda head: chunked_cross_entropy(x, head, jnp.zeros((1, 2048), jnp.int32), chunk=1)[0].sum()  # noqa: E731
    gradient = jax.jit(jax.grad(total), compiler_options=QUICK)(head)
    assert gradient.dtype == dtype and gradient.tolist() == [[-1024.0, 1024.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(chunk=0), "chunk is 0"),
        (dict(vocab_size=17), "vocab_size is 17; the head has 16 columns"),
        (dict(head=jnp.zeros((5, VOCAB))), r"needs a head of shape \(6, V\)"),
        (dict(targets=jnp.zeros((ROWS, LENGTH + 1), jnp.int32)), r"targets of shape \(4, 13\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, head, targets, _ = numbers(dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**{"x": x, "head": head, "targets": targets, "chunk": 4} | change)


# ---------------------------------------------------------------------------------------------------- meshes

EIGHT = (8, 16, 8, 32)  # rows, length, features, vocabulary that eight devices can split
RULES = {"batch": (), "length": ("batch=data", "length=fsdp")}  # what the fsdp axis splits


def compiled(layout, chunk):
    """The program with gradients, its arguments placed, for a head that is split over the vocabulary alone."""

    def place(x, *axes):
        return jax.device_put(x, NamedSharding(layout.mesh, layout.spec(axes, layout.activation_rules)))

    x, head, targets, weights = numbers(*EIGHT)
    arguments = (
        place(x, "batch", "length", "embed"),
        place(head, "embed", "vocab"),
        place(targets, "batch", "length"),
        place(weights, None, "batch", "length"),
    )
    function = with_gradients(chunked_cross_entropy, chunk=chunk, layout=layout, **FORMS["all"])
    return jax.jit(function).lower(*arguments).compile(compiler_options=QUICK), arguments


@pytest.mark.parametrize("split", RULES)
def test_a_mesh_gives_the_numbers_of_one_device(x64, capfd, split):
    """In float64 to 1e-10, and no token moves: the loop exchanges what is summed over the vocabulary."""
    layout = mesh_layout(2, 2, 2)
    layout = dataclasses.replace(layout, activation_rules=change_rules(ACTIVATION_RULES, RULES[split], "rules"))
    program, arguments = compiled(layout, chunk=6)  # 16 is no multiple of 6, nor a device's 8 of 3
    assert_close(program(*arguments), run(plain_cross_entropy, *numbers(*EIGHT), **FORMS["all"]), atol=1e-10)

    collective = re.compile(r" (all-[a-z]+|reduce-scatter|collective-permute)\(")
    exchanges = [line for line in program.as_text().splitlines() if collective.search(line)]
    in_loops = [line for line in exchanges if "while/body" in line]
    outside = [line for line in exchanges if "while/body" not in line]
    sizes = lambda lines: elements("\n".join(collective.split(line)[0] for line in lines))  # noqa: E731
    rows, _, features, vocab = EIGHT
    assert max(sizes(in_loops)) <= rows * 6 * features // 4  # a device's rows of d_x
    # d_head over tensor is summed over fsdp, where each device keeps its piece, and the pieces then over data
    assert set(sizes(outside)) <= {features * vocab // 2, features * vocab // 4} and sizes(outside)
    assert {collective.search(line)[1] for line in exchanges} <= {"all-reduce", "all-gather"}  # a maximum is gathered
    assert "rematerialization" not in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------- memory

CHUNK, WIDE = 32, (2, 1024, 16, 2048)


def elements(program):
    """Elements of every array that a program's text names."""
    return [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\d+\[(\d[\d,]*)\]", program)]


@functools.cache
def shape_only(length, chunk):
    """The program with gradients for rows of `length`, compiled; chunk 0: the plain form."""
    rows, _, features, vocab = WIDE
    of = jax.ShapeDtypeStruct
    function = functools.partial(chunked_cross_entropy, chunk=chunk) if chunk else plain_cross_entropy
    arguments = (of((rows, length, features), jnp.float32), of((features, vocab), jnp.float32))
    arguments += (of((rows, length), jnp.int32), of((2, rows, length), jnp.float32))
    return jax.jit(with_gradients(function, **FORMS["all"])).lower(*arguments).compile()


@pytest.mark.parametrize("length", [1024, 1000], ids=["even", "ragged"])
def test_no_array_holds_all_the_logits(length):
    rows, _, _, vocab = WIDE
    assert max(elements(shape_only(1024, 0).as_text())) == rows * 1024 * vocab  # the test would see it
    assert max(elements(shape_only(length, CHUNK).as_text())) == rows * CHUNK * vocab


def test_memory_is_that_of_a_piece():
    """At four times the length, more by what is linear in it: x, its gradient, and a few numbers for each token."""
    temporary = lambda *args: shape_only(*args).memory_analysis().temp_size_in_bytes  # noqa: E731
    rows, length, features, vocab = WIDE
    logits, piece = 4 * rows * length * vocab, 4 * rows * CHUNK * vocab
    short, long = temporary(length, CHUNK), temporary(4 * length, CHUNK)
    assert temporary(length, 0) > logits
    assert short < 6 * piece < logits / 5
    assert long - short < 4 * 3 * rows * length * (3 * features + 12)


def test_a_layout_without_a_mesh_changes_nothing():
    arrays = numbers(dtype=np.float32)[:3]
    results = (chunked_cross_entropy(*arrays, chunk=4, layout=layout) for layout in (None, Layout()))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
