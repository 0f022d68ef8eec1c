"""Linear layers that multiply 8-bit numbers (`precision.products`): int8, or 8-bit floats.

    y  = x^ W^                x^, W^: x and W rounded; one scale a token of x, one an output of W
    dx = (dy S_W)^ Q_W^T      dy rounded, once the scales of W = Q_W S_W are in it; one scale a token
    dW = x^^T dy              in the dtype of dy

A scale is the largest magnitude it must hold, found anew for every product, so nothing overflows and nothing is
calibrated. The library qwix rounds and multiplies; parameters, gradients and the optimizer stay as they are.

dW sums over tokens, so scales that come out of its sum would hold for all tokens at once, and the gradient would change
with the micro-batches they come in. It also suffers most from rounding (SwitchBack, arXiv 2304.13013, section 2.2). So
two of a layer's three products are of 8-bit numbers, and the gradient is the same on every mesh and with every
accumulation. Rounding is to the nearest number: without a key there is nothing for meshes to disagree on. Embedding,
head, attention scores, router and the experts' grouped products stay as they are. Evaluation and generation round as
training does: their numbers are those of the model that was trained.
"""

import functools
import importlib.util
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config.values import refuse
from llm_jax.precision import at_least_float32

# Of the forward pass, and of gradients: 8-bit floats trade precision for range there (arXiv 2209.05433, section 3).
NUMBERS = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}
# qwix would put the largest whole number at 127.5, the boundary of two: the last bit of a division, which no two
# programs need share, would make it 127 or 128 (where there is no 128: -127 or -128). Here it is put at 127.
LARGEST = {"int8": f"absmax,{127.5 / 127}", "fp8": "absmax"}


def require_library(products: str) -> None:
    """Raises ConfigError where `precision.products` needs a library that is not there."""
    if products != "native" and importlib.util.find_spec("qwix") is None:
        fix = "install it with pip install 'llm-jax[qwix]', or set precision.products=native"
        raise refuse("precision.products", products, "it needs the library qwix, which is not installed", fix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_product(x: jax.Array, matrix: jax.Array, products: str) -> jax.Array:
    """x (N, in) times matrix (in, out), both rounded: (N, out) in the dtype of x, which matrix has too.

    `products`: "int8" or "fp8". A row of x that is not finite gives a row that is not.
    """
    return _forward(x, matrix, products)[0]


def _forward(x: jax.Array, matrix: jax.Array, products: str) -> tuple[jax.Array, Any]:
    number, _ = NUMBERS[products]
    rounded = functools.partial(_rounded, number=number, largest=LARGEST[products])
    kept = rounded(x, axis=0), rounded(matrix, axis=1)
    return _multiply(*kept, ((1,), (0,)), x.dtype), kept


def _backward(products: str, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    _, number = NUMBERS[products]
    scaled = _rounded(at_least_float32(dy) * w.scale, axis=0, number=number, largest=LARGEST[products])
    dx = _multiply(scaled, w.qvalue, ((1,), (1,)), dy.dtype)
    dw = _multiply(_qwix().dequantize(x).astype(dy.dtype), dy, ((0,), (0,)), dy.dtype)
    return dx, dw


quantized_product.defvjp(_forward, _backward)


def _rounded(x: jax.Array, *, axis: int, number: Any, largest: str) -> Any:
    """x in 8 bits, with a scale for every index of `axis`: in 16 bits, scales would cost as much as the rounding."""
    return _qwix().quantize(at_least_float32(x), number, channelwise_axes=(axis,), calibration_method=largest)


def _multiply(a: Any, b: Any, contracted: tuple[tuple[int], tuple[int]], dtype: jnp.dtype) -> jax.Array:
    """Whole numbers are summed in int32; scales are multiplied into the sums."""
    return _qwix().dot_general(a, b, (contracted, ((), ())), preferred_element_type=dtype)


def _qwix() -> ModuleType:
    import qwix  # an extra: only runs that ask for it need it

    return qwix
