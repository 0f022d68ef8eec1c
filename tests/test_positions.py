"""Sinusoids, rotary angles with their scalings, T5's buckets: against formulas in float64 and literal values."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import RopeConfig
from llm_jax.models.positions import relative_bucket, rotary_angles, rotary_frequencies, rotate, sinusoid

# --------------------------------------------------------------------------------------------- sinusoids


def test_sinusoid_at_literal_points():
    table = np.asarray(sinusoid(jnp.array([0, 1, 7, 500]), 6))
    for row, position in zip(table, (0, 1, 7, 500), strict=True):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            np.testing.assert_allclose(row[2 * i], math.sin(angle), atol=1e-4)
            np.testing.assert_allclose(row[2 * i + 1], math.cos(angle), atol=1e-4)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    np.testing.assert_allclose(table[1, :2], [0.8414710, 0.5403023], atol=1e-6)


def test_sinusoid_keeps_leading_axes():
    positions = jnp.array([[0, 1, 2], [0, 0, 1]])
    table = sinusoid(positions, 4)
    assert table.shape == (2, 3, 4) and table.dtype == jnp.float32
    np.testing.assert_array_equal(table[0, 1], table[1, 2])


# ------------------------------------------------------------------------------------------------ rotary


def turned_by_hand(x, positions, rope, head_dim):
    """Pairs (x_i, x_{i + R/2}) as complex numbers, times exp(i * position * base^(-2i/R)), in float64."""
    rotating = int(head_dim * rope.fraction)
    half = rotating // 2
    out = np.array(x, np.float64)
    for i in range(half):
        z = out[..., i] + 1j * out[..., i + half]
        z = z * np.exp(1j * positions * rope.base ** (-2 * i / rotating))[:, :, None]
        out[..., i], out[..., i + half] = z.real, z.imag
    return out


@pytest.mark.parametrize(
    "rope",
    [RopeConfig(), RopeConfig(base=500.0), RopeConfig(fraction=0.5)],
    ids=("plain", "base", "partial"),
)
def test_rotary_is_a_complex_rotation(rope):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 100]])
    out = rotate(jnp.asarray(x), rotary_angles(rope, 8, jnp.asarray(positions)))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, turned_by_hand(x, positions, rope, 8), atol=2e-5)
    np.testing.assert_array_equal(out[:, 0], x[:, 0])  # at place 0 nothing turns
    if rope.fraction == 0.5:
        np.testing.assert_array_equal(out[..., 4:], x[..., 4:])


@pytest.mark.parametrize("rope", [RopeConfig(), RopeConfig(fraction=0.5), RopeConfig(scaling="linear", factor=4.0)])
def test_scores_depend_on_distance_alone(rope):
    query, key = np.random.default_rng(1).normal(size=(2, 1, 6, 1, 8)).astype(np.float32)
    query[:] = query[:, :1]
    key[:] = key[:, :1]  # the same query and key at every place

    def scores(shift):
        angles = rotary_angles(rope, 8, jnp.arange(6)[None] + shift)
        return np.einsum("bthd,bshd->ts", rotate(jnp.asarray(query), angles), rotate(jnp.asarray(key), angles))

    np.testing.assert_allclose(scores(0), scores(37), atol=2e-5)
    for distance in range(-5, 6):
        diagonal = np.diagonal(scores(0), distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)


def test_rotation_in_bfloat16_uses_float32_angles():
    """Place 1000 has no exact bfloat16; the angle must not be rounded to one."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    out = rotate(x, rotary_angles(RopeConfig(), 2, jnp.array([[1001]])))
    assert out.dtype == jnp.bfloat16
    expected = [math.cos(1001) - math.sin(1001), math.cos(1001) + math.sin(1001)]
    np.testing.assert_allclose(np.asarray(out[0, 0, 0], np.float32), expected, rtol=0.01)


def test_frequencies_unscaled_and_linear():
    plain, scale = rotary_frequencies(RopeConfig(), 8)
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-12)
    assert scale == 1.0
    linear, scale = rotary_frequencies(RopeConfig(scaling="linear", factor=8.0), 8)
    np.testing.assert_allclose(linear, plain / 8, rtol=1e-12)
    assert scale == 1.0


LLAMA3 = RopeConfig(base=500_000.0, scaling="llama3", factor=8.0, original_length=8192)
YARN = RopeConfig(base=10_000.0, scaling="yarn", factor=4.0, original_length=4096)


def test_llama3_frequencies():
    """By wavelength: above 8192 divided by 8, below 2048 kept, between them a blend."""
    frequencies, scale = rotary_frequencies(LLAMA3, 64)
    kinds = set()
    for i, found in enumerate(frequencies):
        plain = 500_000.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / plain
        if wavelength > 8192:
            kinds.add("slowed")
            expected = plain / 8
        elif wavelength < 2048:
            kinds.add("kept")
            expected = plain
        else:
            kinds.add("blend")
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert math.isclose(found, expected, rel_tol=1e-12)
    assert kinds == {"slowed", "kept", "blend"} and scale == 1.0


def test_yarn_frequencies():
    """More than 32 turns over 4096 tokens: kept; fewer than 1: divided by 4; a ramp over the pairs' numbers between."""
    frequencies, scale = rotary_frequencies(YARN, 64)
    first = math.floor(64 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(10_000)))
    last = math.ceil(64 * math.log(4096 / (1 * 2 * math.pi)) / (2 * math.log(10_000)))
    assert (first, last) == (10, 23)
    for i, found in enumerate(frequencies):
        plain = 10_000.0 ** (-2 * i / 64)
        share = min(max((i - first) / (last - first), 0.0), 1.0)
        assert math.isclose(found, share * plain / 4 + (1 - share) * plain, rel_tol=1e-12)
    assert scale == 0.1 * math.log(4) + 1
    pairs = np.array([0, 10, 23, 31])
    np.testing.assert_allclose(frequencies[pairs] * 10_000 ** (pairs / 32), [1, 1, 0.25, 0.25])


def test_yarn_scales_sine_and_cosine():
    cos, sin = rotary_angles(YARN, 64, jnp.array([[0, 3]]))
    np.testing.assert_allclose(cos[0, 0, 0], 0.1 * math.log(4) + 1, rtol=1e-6)
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * math.log(4) + 1) ** 2, rtol=1e-5)


# --------------------------------------------------------------------------------------------- T5's buckets

# of distances 0 .. 20 with 8 buckets up to 16: four exact, then 4 + floor(4 * ln(d / 4) / ln 4), 7 at most
BUCKETS = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7]


def test_relative_buckets():
    assert np.asarray(relative_bucket(jnp.arange(21), 8, 16)).tolist() == BUCKETS
    assert np.asarray(relative_bucket(jnp.array([-1, -100]), 8, 16)).tolist() == [0, 0]  # keys ahead, masked anyway
    ends = np.asarray(relative_bucket(jnp.array([0, 15, 16, 20, 50, 127, 128, 5000]), 32, 128))
    assert ends.tolist() == [0, 15, 16, 17, 24, 31, 31, 31]


# ----------------------------------------------------------------------------------- against transformers


def parity(name):
    torch = pytest.importorskip("torch", reason="needs torch (the extra `parity`)")
    pytest.importorskip("transformers", reason="needs transformers (the extra `parity`)")
    return torch, pytest.importorskip(name)


@pytest.mark.parity
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(scaling="linear", factor=2.0),
        LLAMA3,
        RopeConfig(base=10_000.0, scaling="llama3", factor=32.0, low_freq_factor=2.0, original_length=1024),
        YARN,
        RopeConfig(scaling="yarn", factor=16.0, original_length=64, beta_fast=16.0, beta_slow=2.0),
        RopeConfig(scaling="yarn", factor=2.0, original_length=2048, fraction=0.5),
    ],
    ids=lambda rope: f"{rope.scaling}{rope.factor:g}",
)
def test_frequencies_are_those_of_transformers(rope, head_dim):
    _, utils = parity("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    parameters = {
        "rope_type": rope.scaling,
        "rope_theta": rope.base,
        "factor": rope.factor,
        "partial_rotary_factor": rope.fraction,
        "original_max_position_embeddings": rope.original_length,
    }
    if rope.scaling == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=int(rope.original_length * rope.factor),
        rope_parameters=parameters,
    )
    expected, scale = utils.ROPE_INIT_FUNCTIONS[rope.scaling](config, "cpu")
    found, our_scale = rotary_frequencies(rope, head_dim)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)
    assert math.isclose(our_scale, scale, rel_tol=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 16), (16, 1000), (2, 2), (5, 20)])
def test_buckets_are_those_of_transformers(buckets, longest):
    torch, t5 = parity("transformers.models.t5.modeling_t5")
    distances = np.arange(0, 3000, dtype=np.int32)
    expected = t5.T5Attention._relative_position_bucket(
        torch.from_numpy(-distances).long(), bidirectional=False, num_buckets=buckets, max_distance=longest
    )
    np.testing.assert_array_equal(relative_bucket(jnp.asarray(distances), buckets, longest), expected.numpy())
