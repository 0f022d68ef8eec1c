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
    _pending: str = ""
    _decoder: codecs.IncrementalDecoder = dataclasses.field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

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
            ready, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
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
        say = on_text or (lambda row, piece: None)
        encoded = self.tokenizer.encode([prompt or self.default_prompt for prompt in prompts])
        rows = [Row([int(token) for token in ids], cfg.stop) for ids in encoded]
        for number, row in enumerate(rows):
            if not row.tokens:
                raise UserError(f"Prompt {number + 1} ({prompts[number]!r}) has no tokens; give at least one character.")
        keys = jax.vmap(lambda row: jax.random.fold_in(rng.stream(seed, "sample"), row))(jnp.arange(len(rows)))

        made, longest = 0, self.model.cfg.max_length
        while made < cfg.max_tokens and not all(row.done for row in rows):
            # A full context is cut to its last half and read again, so that text can be longer than the context.
            keep = longest if max(len(row.tokens) for row in rows) < longest else max(longest // 2, 1)
            made = self._fill(rows, keys, cfg, made, keep, say)
        for number, row in enumerate(rows):
            say(number, row.finish())
        return [row.text for row in rows]

    def _fill(
        self,
        rows: list[Row],
        keys: jax.Array,
        cfg: GenerateConfig,
        made: int,
        keep: int,
        say: Callable[[int, str], None],
    ) -> int:
        """Read the last `keep` tokens of each row, then write until all are done or the context is full."""
        contexts = [row.tokens[-keep:] for row in rows]
        width = max(len(context) for context in contexts)
        limit = min(self.model.cfg.max_length, width + cfg.max_tokens - made)
        cache_length = min(-(-limit // CACHE_STEP) * CACHE_STEP, self.model.cfg.max_length)

        padded_width = min(-(-width // CACHE_STEP) * CACHE_STEP, cache_length)
        tokens = np.zeros((len(rows), padded_width), np.int32)
        positions = np.full((len(rows), padded_width), cache_length, np.int32)  # beyond the cache: padding
        for number, context in enumerate(contexts):
            tokens[number, : len(context)] = context
            positions[number, : len(context)] = np.arange(len(context))
        lengths = jnp.asarray([len(context) for context in contexts], jnp.int32)
        token, cache = self._prefill(self.params, tokens, positions, lengths, keys, made, cfg, cache_length)

        for filled in range(width, limit + 1):
            self._take(rows, np.asarray(token), say)
            made += 1
            if made == cfg.max_tokens or filled == limit or all(row.done for row in rows):
                return made
            token, cache = self._decode(self.params, cache, token, lengths, keys, made, cfg, cache_length)
            lengths = lengths + 1
        return made

    def _take(self, rows: list[Row], tokens: np.ndarray, say: Callable[[int, str], None]) -> None:
        for number, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            row.tokens.append(token)
            if row.done:
                continue
            if token == self.tokenizer.eos_id:
                say(number, row.finish())
            else:
                say(number, row.add(self.tokenizer.decode_bytes([token])))

    @functools.partial(jax.jit, static_argnums=(0, 7, 8))
    def _prefill(
        self,
        params: Any,
        tokens: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        keys: jax.Array,
        made: jax.Array,
        cfg: GenerateConfig,
        cache_length: int,
    ) -> tuple[jax.Array, Any]:
        logits, cache = self.model.apply_cached(params, {}, tokens, positions, cache_length)
        last = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]
        return self._sample(last, keys, made, cfg), cache

    @functools.partial(jax.jit, static_argnums=(0, 7, 8), donate_argnums=2)
    def _decode(
        self,
        params: Any,
        cache: Any,
        token: jax.Array,
        lengths: jax.Array,
        keys: jax.Array,
        made: jax.Array,
        cfg: GenerateConfig,
        cache_length: int,
    ) -> tuple[jax.Array, Any]:
        logits, cache = self.model.apply_cached(params, cache, token[:, None], lengths[:, None], cache_length)
        return self._sample(logits[:, 0], keys, made, cfg), cache

    def _sample(self, logits: jax.Array, keys: jax.Array, made: jax.Array, cfg: GenerateConfig) -> jax.Array:
        real = jnp.arange(logits.shape[-1]) < self.model.cfg.vocab_size
        logits = jnp.where(real[None], logits, -jnp.inf)
        return sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, made), cfg)
