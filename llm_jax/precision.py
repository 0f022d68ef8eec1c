"""In which dtypes parameters are kept and products are computed."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.config import PrecisionConfig


@dataclasses.dataclass(frozen=True)
class Precision:
    """`params`: dtype in which parameters are stored and updated; `compute`: dtype of activations and products;
    `products`: to what the blocks' linear layers round both operands, "int8" or "fp8"; "native": they do not.
    """

    params: jnp.dtype = jnp.dtype("float32")
    compute: jnp.dtype = jnp.dtype("float32")
    products: str = "native"

    @classmethod
    def make(cls, cfg: PrecisionConfig) -> "Precision":
        return cls(jnp.dtype(cfg.params), jnp.dtype(cfg.compute), cfg.products)


def wide_einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The product's own sums, in at least float32, whatever the dtype of the operands."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide)


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, or in float64 where it is that already: norms, softmax and losses are computed so."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
