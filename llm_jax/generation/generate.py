"""Text from prompts: one pass over all prompts fills the cache, then one token a step for every row."""

import codecs
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import rng
from llm_jax.config import GenerateConfig
from llm_jax.errors import UserError
from llm_jax.generation.sampling import sample
from llm_jax.models.registry import Model

CACHE_STEP = 128  # cache lengths are multiples of this, so that few shapes are ever compiled


class Tokenizer(Protocol):
    """What generation asks of a tokenizer."""

    eos_id: int | None

    def encode(self, texts: list[str]) -> list[np.ndarray]: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


@dataclasses.dataclass
class Row:
    """One text as it grows. `text` lags behind the tokens while a character or a stop string may still be cut."""

    tokens: list[int]
    stop: tuple[str, ...]
    text: str = ""
    done: bool = False
    _start: int = 0  # first token of the context
    _pending: str = ""
    _decoder: codecs.IncrementalDecoder = dataclasses.field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def context(self, longest: int) -> list[int]:
        """The tokens that the model reads. One too many for it, and they are cut to the last half of the longest
        context, so that text can be longer: a matter of this row alone, whatever the others of its batch need."""
        if self.done:
            return self.tokens[-1:]
        if len(self.tokens) - self._start > longest:
            self._start = len(self.tokens) - max(longest // 2, 1)
        return self.tokens[self._start :]

    def add(self, piece: bytes) -> str:
        """Take the next token's bytes; returns the text that is now certain."""
        return self._release(self._decoder.decode(piece), final=False)

    def finish(self) -> str:
        """End the row; returns the rest of its text."""
        rest = "" if self.done else self._release(self._decoder.decode(b"", final=True), final=True)
        self.done = True
        return rest

    def _release(self, piece: str, *, final: bool) -> str:
        self._pending += piece
        cuts = [self._pending.find(stop) for stop in self.stop if stop in self._pending]
        if cuts:
            self.done = True
            ready, self._pending = self._pending[: min(cuts)], ""
        else:
            held = 0 if final else max((_overlap(self._pending, stop) for stop in self.stop), default=0)
            certain = len(self._pending) - held
            ready, self._pending = self._pending[:certain], self._pending[certain:]
        self.text += ready
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


class Generator:
    """A model with its parameters and tokenizer, ready to continue prompts."""

    def __init__(self, model: Model, params: Any, tokenizer: Tokenizer, default_prompt: str = "\n"):
        """`default_prompt` stands in for an empty one: a model needs something to continue."""
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.default_prompt = default_prompt

    def __call__(
        self,
        prompts: Sequence[str],
        cfg: GenerateConfig,
        seed: int = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """Continue every prompt.

        Args:
          prompts: texts; rows of one batch, each with its own random stream.
          cfg: how to sample and where to stop.
          seed: of the random streams; the same seed, prompt and row give the same text.
          on_text: called with (row, piece) as text becomes certain.

        Returns:
          The continuations, without the prompts, cut before a stop string.
        """
        if not 0 <= seed < 2**32:
            raise UserError(f"The seed of the sampling is {seed}; it has 32 bits, so give one from 0 to {2**32 - 1}.")
        if "" in cfg.stop:
            raise UserError("One of the stop strings is empty, and every text holds the empty string; leave it out.")
        on_text = on_text or (lambda row, piece: None)
        say = lambda row, piece: on_text(row, piece) if piece else None  # noqa: E731
        encoded = self.tokenizer.encode([prompt or self.default_prompt for prompt in prompts])
        rows = [Row([int(token) for token in ids], cfg.stop) for ids in encoded]
        for number, row in enumerate(rows):
            if not row.tokens:
                text = prompts[number]
                raise UserError(f"Prompt {number + 1} ({text!r}) has no tokens; give at least one character.")
        made = 0
        while made < cfg.max_tokens and not all(row.done for row in rows):
            made = self._fill(rows, cfg, seed, made, say)
        for number, row in enumerate(rows):
            say(number, row.finish())
        return [row.text for row in rows]

    def _fill(self, rows: list[Row], cfg: GenerateConfig, seed: int, made: int, say: Callable[[int, str], None]) -> int:
        """Read each row's context, then write until all are done or a context is full. Returns the tokens made."""
        longest = self.model.cfg.max_length
        contexts = [row.context(longest) for row in rows]
        width = max(len(context) for context in contexts)
        limit = min(longest, width + cfg.max_tokens - made)
        cache_length = min(-(-limit // CACHE_STEP) * CACHE_STEP, longest)

        padded_width = min(-(-width // CACHE_STEP) * CACHE_STEP, cache_length)
        tokens = np.zeros((len(rows), padded_width), np.int32)
        positions = np.full((len(rows), padded_width), cache_length, np.int32)  # beyond the cache: padding
        for number, context in enumerate(contexts):
            tokens[number, : len(context)] = context
            positions[number, : len(context)] = np.arange(len(context))
        lengths = np.asarray([len(context) for context in contexts], np.int32)

        # What is compiled depends on how to sample, not on the prompt or where to stop.
        static = (self.model, dataclasses.replace(cfg, prompt="", stop=(), max_tokens=0), cache_length)
        seed = np.uint32(seed)
        token, cache = _prefill(*static, self.params, tokens, positions, lengths, seed, np.int32(made))
        for filled in range(width, limit + 1):
            self._take(rows, np.asarray(token), say)
            made += 1
            if made == cfg.max_tokens or filled == limit or all(row.done for row in rows):
                return made
            token, cache = _decode(*static, self.params, cache, token, lengths, seed, np.int32(made))
            lengths = lengths + 1
        return made

    def _take(self, rows: list[Row], tokens: np.ndarray, say: Callable[[int, str], None]) -> None:
        for number, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if row.done:
                continue
            row.tokens.append(token)
            if token == self.tokenizer.eos_id:
                say(number, row.finish())
            else:
                say(number, row.add(self.tokenizer.decode_bytes([token])))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    model: Model,
    cfg: GenerateConfig,
    cache_length: int,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    seed: jax.Array,
    made: jax.Array,
) -> tuple[jax.Array, Any]:
    """Read tokens (B, T), of which `lengths` (B,) are real; returns the next tokens (B,) and the cache."""
    logits, cache = model.apply_cached(params, {}, tokens, positions, cache_length)
    last = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]
    return _sample(model, cfg, last, seed, made), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(
    model: Model,
    cfg: GenerateConfig,
    cache_length: int,
    params: Any,
    cache: Any,
    token: jax.Array,
    lengths: jax.Array,
    seed: jax.Array,
    made: jax.Array,
) -> tuple[jax.Array, Any]:
    """Read one more token of each row, at the place `lengths` (B,); returns the next ones and the cache."""
    logits, cache = model.apply_cached(params, cache, token[:, None], lengths[:, None], cache_length)
    return _sample(model, cfg, logits[:, 0], seed, made), cache


def _sample(model: Model, cfg: GenerateConfig, logits: jax.Array, seed: jax.Array, made: jax.Array) -> jax.Array:
    """(B, V) to (B,), the same on every device: a stream of its own for each row and each token made."""
    real = jnp.arange(logits.shape[-1]) < model.cfg.vocab_size
    logits = jnp.where(real[None], logits, -jnp.inf)
    key = rng.stream(seed, "sample", made)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits)))
    return model.module.layout(sample(logits, keys, cfg), None)
