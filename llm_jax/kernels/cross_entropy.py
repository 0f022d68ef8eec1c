"""Cross-entropy for each token: from logits, or from hidden states without ever making all the logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llm_jax.precision import at_least_float32, wide_einsum
from llm_jax.sharding import Layout


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """-log softmax(logits)[target] and log Z, for each token, in at least float32.

    Args:
      logits: (..., V). Entries of -inf (ids that no text can have) take no part, in smoothing neither.
      targets: (...) int32 in [0, V).
      label_smoothing: e in (1 - e) * onehot + e * uniform over the ids that can occur.

    Returns:
      (...) negative log-likelihood, less the constant that smoothing adds, so that a perfect prediction has 0 (t5x
      `losses.py`); and (...) log Z = logsumexp(logits).
    """
    logits = at_least_float32(logits)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - target
    if label_smoothing:
        possible = jnp.isfinite(logits)
        count = possible.sum(-1)
        mean = jnp.where(possible, logits, 0).sum(-1) / count
        high, low = 1 - label_smoothing + label_smoothing / count, label_smoothing / count
        entropy = -(high * jnp.log(high) + (count - 1) * low * jnp.log(low))
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_z - mean) - entropy
    return loss, log_z


def logits_gradient(
    logits: jax.Array,
    log_z: jax.Array,
    targets: jax.Array,
    d_loss: jax.Array,
    d_log_z: jax.Array,
    label_smoothing: float,
) -> jax.Array:
    """What `cross_entropy` passes back to its logits (..., V), of their shape and dtype; the others lack that axis."""
    log_z, targets, d_loss, d_log_z = (y[..., None] for y in (log_z, targets, d_loss, d_log_z))
    wanted = jnp.where(_ids(logits) == targets, 1 - label_smoothing, 0.0)
    if label_smoothing:
        possible = jnp.isfinite(logits)
        wanted = wanted + jnp.where(possible, label_smoothing, 0.0) / possible.sum(-1, keepdims=True)
    return (d_loss + d_log_z) * jnp.exp(logits - log_z) - d_loss * wanted


def _cross_entropy_forward(logits: jax.Array, targets: jax.Array, label_smoothing: float):
    loss, log_z = cross_entropy(logits, targets, label_smoothing)
    return (loss, log_z), (logits, log_z, targets)


def _cross_entropy_backward(label_smoothing: float, saved, cotangents):
    """In one pass: JAX's own would fill an array of the logits' size with zeros, to scatter the targets' part into."""
    logits, log_z, targets = saved
    gradient = logits_gradient(at_least_float32(logits), log_z, targets, *cotangents, label_smoothing)
    # The barrier: both products after it read this one array, where XLA:CPU would compute it for each of them.
    return jax.lax.optimization_barrier(gradient.astype(logits.dtype)), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def capped_logits(logits: jax.Array, softcap: float, vocab_size: int) -> jax.Array:
    """c * tanh(logits / c) where the soft-cap c is not 0; -inf for the ids of (..., V) from `vocab_size` on."""
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if vocab_size < logits.shape[-1]:
        logits = jnp.where(_ids(logits) < vocab_size, logits, -jnp.inf)
    return logits


def chunked_cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cross_entropy` of the logits x @ head, of which only (B, chunk, V) exist at a time, forward and backward.

    A loop goes over pieces of the length axis; its memory is a few arrays of that size. The backward pass computes each
    piece's logits again (one product more), turns them into their gradient on the spot (d loss / d logits = softmax -
    wanted) and adds the piece's part of the head's gradient in at least float32. Products take operands in the dtype of
    x and sum in at least float32.

    On a mesh every device keeps its own rows and its own part of the length, and works on every piece; the gradient of
    the head is summed over the devices once, after the loop.

    Args:
      x: (B, T, D) final hidden states.
      head: (D, V), cast to the dtype of x; its gradient has its own dtype.
      targets: (B, T) int32 in [0, vocab_size).
      chunk: tokens of a row whose logits exist at a time, at least 1; T need not be a multiple. Where the length is
        split over devices, at least one token of each device's part.
      label_smoothing: as in `cross_entropy`.
      softcap: c of c * tanh(logits / c); 0: none.
      vocab_size: ids from here on have the logit -inf; None: V.
      layout: how the arrays are split over a mesh; None: not at all.

    Returns:
      Loss and log Z (B, T) as `cross_entropy` gives them, in at least float32; and (B, T) bool, whether the target is
      the likeliest id, which has no gradient.

    Raises:
      ValueError: the shapes do not fit, or chunk or vocab_size is out of range.
    """
    layout = layout or Layout()
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1.")
    if head.shape[0] != x.shape[2] or targets.shape != x.shape[:2]:
        raise ValueError(
            f"x of shape {x.shape} needs a head of shape ({x.shape[2]}, V) and targets of shape {x.shape[:2]}; they "
            f"have {head.shape} and {targets.shape}."
        )
    if vocab_size is not None and not 1 <= vocab_size <= head.shape[1]:
        raise ValueError(f"vocab_size is {vocab_size}; the head has {head.shape[1]} columns.")
    x = layout(x, "batch", "length", "embed")
    pieces = _Pieces.of(layout, x.shape[1], chunk)
    form = _Form(label_smoothing, softcap, vocab_size or head.shape[1], layout)
    outputs = _over_pieces(pieces.split(x), head, pieces.split(targets), form)
    return tuple(pieces.join(y) for y in outputs)


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """How (B, T, ...) becomes (n, S, R, P, C, ...): n pieces of R rows by C tokens for each device.

    S devices split the batch and P the length, so a piece takes C tokens of each device's part of the length: no token
    moves, no device waits. The last piece of each part is padded.
    """

    layout: Layout
    row_parts: int
    length_parts: int
    count: int
    size: int
    length: int  # tokens of each part

    @classmethod
    def of(cls, layout: Layout, length: int, chunk: int) -> "_Pieces":
        row_parts, length_parts = layout.batch_shards, layout.activation_pieces("length")
        part = length // length_parts
        size = -(-part // -(-part // max(chunk // length_parts, 1)))  # as even as they can be: little padding
        return cls(layout, row_parts, length_parts, -(-part // size), size, part)

    def split(self, x: jax.Array) -> jax.Array:
        """(B, T, ...) to (n, S, R, P, C, ...)."""
        rest = x.shape[2:]
        x = x.reshape(self.row_parts, -1, self.length_parts, self.length, *rest)
        missing = self.count * self.size - self.length
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, missing)] + [(0, 0)] * len(rest))
        x = x.reshape(*x.shape[:3], self.count, self.size, *rest)
        return self._placed(jnp.moveaxis(x, 3, 0))

    def join(self, x: jax.Array) -> jax.Array:
        """(n, S, R, P, C) to (B, T)."""
        x = jnp.moveaxis(self._placed(x), 0, 3)
        x = x.reshape(*x.shape[:3], -1)[..., : self.length]
        return self.layout(x.reshape(x.shape[0] * x.shape[1], -1), "batch", "length")

    def _placed(self, x: jax.Array) -> jax.Array:
        return self.layout(x, None, "batch", None, "length", *(None,) * (x.ndim - 4))


@dataclasses.dataclass(frozen=True)
class _Form:
    """What stands between a piece of hidden states and its losses."""

    label_smoothing: float
    softcap: float
    vocab_size: int
    layout: Layout

    def kernel(self, head: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The head as the products take it, gathered before the loop and not in every round of it."""
        return self.layout(head.astype(dtype), "embed", "vocab")

    def logits(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """(S, R, P, C, D) to (S, R, P, C, V), in at least float32."""
        logits = wide_einsum("srpcd,dv->srpcv", x, kernel)
        logits = self.layout(logits, "batch", None, "length", None, "vocab")
        return capped_logits(logits, self.softcap, self.vocab_size)

    def logits_gradient(
        self, logits: jax.Array, log_z: jax.Array, targets: jax.Array, d_loss: jax.Array, d_log_z: jax.Array
    ) -> jax.Array:
        """Gradient with respect to the product, of the shape and dtype of `logits`; the others lack its last axis."""
        gradient = logits_gradient(logits, log_z, targets, d_loss, d_log_z, self.label_smoothing)
        if self.softcap:
            gradient = gradient * (1 - jnp.square(logits / self.softcap))
            gradient = jnp.where(_ids(logits) < self.vocab_size, gradient, 0)  # 0 times infinity, where logits are -inf
        return gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _over_pieces(
    x: jax.Array, head: jax.Array, targets: jax.Array, form: _Form
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x (n, S, R, P, C, D), head (D, V) and targets (n, S, R, P, C) to loss, log Z and `correct`, shaped as targets."""
    kernel = form.kernel(head, x.dtype)

    def piece(x_and_targets: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, targets = x_and_targets
        logits = form.logits(x, kernel)
        return *cross_entropy(logits, targets, form.label_smoothing), logits.argmax(-1) == targets

    return jax.lax.map(piece, (x, targets))


def _forward(x: jax.Array, head: jax.Array, targets: jax.Array, form: _Form):
    outputs = _over_pieces(x, head, targets, form)
    return outputs, (x, head, targets, outputs[1])


def _backward(form: _Form, saved, cotangents):
    x, head, targets, log_z = saved
    d_loss, d_log_z, _ = cotangents
    kernel = form.kernel(head, x.dtype)

    def piece(d_head: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, *others = inputs
        # In the dtype of x, as the gradients of all other products are.
        d_logits = form.logits_gradient(form.logits(x, kernel), *others).astype(x.dtype)
        d_x = wide_einsum("srpcv,dv->srpcd", d_logits, kernel).astype(x.dtype)
        d_head = d_head + wide_einsum("srpcd,srpcv->spdv", x, d_logits)
        return form.layout(d_head, "batch", "length", "embed", "vocab"), d_x

    # Each device has a sum of its own (the axes s and p): one over all devices would be exchanged in every round.
    shape = (x.shape[1], x.shape[3], *head.shape)
    zeros = jnp.zeros(shape, jnp.promote_types(x.dtype, jnp.float32))
    zeros = form.layout(zeros, "batch", "length", "embed", "vocab")
    d_head, d_x = jax.lax.scan(piece, zeros, (x, log_z, targets, d_loss, d_log_z))
    return d_x, form.layout.summed(d_head, "embed", "vocab").astype(head.dtype), None


_over_pieces.defvjp(_forward, _backward)


def _ids(logits: jax.Array) -> jax.Array:
    """The id that each entry of (..., V) belongs to, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
