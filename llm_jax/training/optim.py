"""The optimizer: learning-rate schedules, and one optax chain made from the config and the parameters' axes.

What a parameter is (matrix, embedding, vector) follows from its logical axes, never from its rank: a scanned
stack of norm scales has two dimensions and is still a stack of vectors.

Weight decay is decoupled for every optimizer: p <- p * (1 - learning_rate * weight_decay) - learning_rate * u
(Loshchilov and Hutter 2019, arXiv 1711.05101, in the form of torch.optim.AdamW).
"""

import difflib
import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax.config.checks import check_optim, warmup_updates
from llm_jax.config.kinds import STACKING_AXES
from llm_jax.config.schema import OptimConfig
from llm_jax.errors import ConfigError
from llm_jax.models.lora import is_adapter
from llm_jax.precision import at_least_float32
from llm_jax.sharding import path_name
from llm_jax.training.heads import is_head

Tree = Any  # nested dicts of leaves

# ------------------------------------------------------------------------------------------------- schedules


def learning_rate(cfg: OptimConfig, total_updates: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """The learning rate of update i, as a float32 scalar; i = 0 is the first applied update of `total_updates`.

    With w warm-up updates, end T (`decay_steps`, else the last update) and c = round(cooldown_ratio * total_updates):

        i < w          peak * warmup_form
        cosine         final + (peak - final) * (1 + cos(pi * (i - w) / (T - w))) / 2
        linear         peak + (final - peak) * (i - w) / (T - w)
        wsd            peak until T - c, then linear to final at T
        constant       peak
        inverse_sqrt   peak * sqrt(w / i), with w = 1 and i + 1 where there is no warm-up

    The first three stay at final = final_ratio * peak after T; the last two have no end.

    Raises:
      ConfigError: the warm-up and the decay do not fit into the run.
    """
    check_optim(cfg, total_updates)
    peak, final = cfg.learning_rate, cfg.final_ratio * cfg.learning_rate
    w = warmup_updates(cfg, total_updates)
    decay = max((cfg.decay_steps or total_updates - 1) - w, 1)  # from the warm-up's end to the decay's
    warmup = {
        "(i+1)/(w+1)": lambda i: peak * (i + 1) / (w + 1),
        "(i+1)/w": lambda i: peak * (i + 1) / w,
        "i/w": lambda i: peak * i / w,
    }[cfg.warmup_form]
    match cfg.schedule:  # each as a function of i - w
        case "cosine":
            after = optax.cosine_decay_schedule(peak, decay, alpha=cfg.final_ratio)
        case "linear":
            after = optax.linear_schedule(peak, final, decay)
        case "wsd":
            cooldown = min(round(cfg.cooldown_ratio * total_updates), decay)  # may begin at the peak itself
            stable = optax.constant_schedule(peak)
            falling = optax.linear_schedule(peak, final, max(cooldown, 1))
            after = optax.join_schedules([stable, falling], [decay - cooldown])
        case "constant":
            after = optax.constant_schedule(peak)
        case "inverse_sqrt":
            after = lambda i: peak * jnp.sqrt(max(w, 1) / (jnp.maximum(i, 0) + max(w, 1)))  # noqa: E731
    schedule = optax.join_schedules([warmup, after], [w]) if w else after
    rate = lambda i: jnp.asarray(schedule(jnp.asarray(i)), jnp.float32)  # noqa: E731
    return lambda i: jnp.maximum(rate(i), 0)  # a line that falls to 0 may be rounded to below it


# --------------------------------------------------------------------------------------- what a parameter is

TABLES = ("vocab", "position", "buckets")  # an axis of these makes a look-up table or an output head


def stack_depth(axes: Sequence[str]) -> int:
    """How many leading axes stack independent tensors: 1 for ("layers", "embed", "mlp")."""
    return next((i for i, axis in enumerate(axes) if axis not in STACKING_AXES), len(axes))


def role(axes: Sequence[str]) -> str:
    """What a parameter is: "vector" (norm, bias), "embedding" (table, head), "matrix" (hidden linear layer), or
    "balance" (what a router adds to experts' scores, which moves by a rule of its own)."""
    own = axes[stack_depth(axes) :]
    if own == ("balance",):
        return "balance"
    if len(own) < 2:
        return "vector"
    return "embedding" if any(axis in TABLES for axis in own) else "matrix"


def _map_axes(f: Callable[[tuple[str, ...]], Any], axes: Tree) -> Tree:
    return jax.tree.map(f, axes, is_leaf=lambda x: isinstance(x, tuple))


def decay_mask(cfg: OptimConfig, axes: Tree) -> Tree:
    """True at the parameters that decay."""
    decayed = {
        "matrices": ("matrix", "embedding"),
        "hidden": ("matrix",),
        "all": ("matrix", "embedding", "vector"),
    }[cfg.decay_mask]
    return _map_axes(lambda a: role(a) in decayed, axes)


def trainable_mask(cfg: OptimConfig, shapes: Tree) -> Tree:
    """False at the parameters that a pattern of `cfg.freeze` names; in a model with adapters True at those alone, and
    at an encoder's head, which has none."""
    frozen = matching_mask("optim.freeze", cfg.freeze, shapes)
    if any(map(is_adapter, paths(shapes))):
        base = _map_paths(lambda path: not is_adapter(path) and not is_head(path), shapes)
        frozen = jax.tree.map(operator.or_, frozen, base)
    if all(jax.tree.leaves(frozen)):
        raise ConfigError(f"optim.freeze={cfg.freeze} freezes every parameter, so nothing would train; narrow it")
    return jax.tree.map(lambda there: not there, frozen)


def counted_mask(trainable: Tree | None, axes: Tree) -> Tree | None:
    """True at the parameters whose gradients count in the norm: those that train, without balance biases, whose
    gradients are no slopes of the loss. None: all do."""
    counted = _map_axes(lambda a: role(a) != "balance", axes)
    if trainable is not None:
        counted = jax.tree.map(lambda a, b: a and b, counted, trainable)
    return None if all(jax.tree.leaves(counted)) else counted


def matching_mask(key: str, patterns: Sequence[str], shapes: Tree) -> Tree:
    """True at the parameters that one of the patterns names; `key` is named where one matches nothing."""
    found = {path for pattern in patterns for path in _matching(key, pattern, paths(shapes))}
    return _map_paths(lambda path: path in found, shapes)


def lr_factors(cfg: OptimConfig, shapes: Tree) -> Tree:
    """The factor on each parameter's learning rate, 1.0 where no entry of `cfg.lr_multipliers` names it."""
    factors: dict[str, float] = {}
    for entry in cfg.lr_multipliers:
        pattern, _, factor = entry.rpartition("=")
        if not pattern or not _is_positive_number(factor):
            raise ConfigError(
                f"optim.lr_multipliers: {entry!r} is not PATTERN=FACTOR with a factor above 0, such as '.*/bias=2.0'"
            )
        matched = _matching("optim.lr_multipliers", pattern, paths(shapes))
        if all(path.endswith("/balance_bias") for path in matched):
            raise ConfigError(
                f"optim.lr_multipliers: {entry!r} names {matched[0]} alone, which has no learning rate; set "
                "model.moe.balance_rate"
            )
        for path in matched:
            if path in factors:
                raise ConfigError(f"optim.lr_multipliers: two entries match the parameter {path}; make them disjoint")
            factors[path] = float(factor)
    return _map_paths(lambda path: factors.get(path, 1.0), shapes)


def paths(tree: Tree) -> list[str]:
    """The leaves' names, as "decoder/layers/mlp/up/kernel"."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _map_paths(f: Callable[[str], Any], tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, _: f(path_name(path)), tree)


def _matching(key: str, pattern: str, names: list[str]) -> list[str]:
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is not a regular expression ({error})") from None
    if not found:
        nearest = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
        raise ConfigError(
            f"{key}: the pattern {pattern!r} matches no parameter (the whole path must match); nearest paths: {nearest}"
        )
    return found


def _is_positive_number(text: str) -> bool:
    try:
        return 0.0 < float(text) < math.inf
    except ValueError:
        return False


# -------------------------------------------------------------------------------------------- the optimizer


def make(
    cfg: OptimConfig, total_updates: int, shapes: Tree, axes: Tree, *, balance_rate: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """The whole update rule: (gradients, state, parameters) -> (what to add to the parameters, state).

    A caller that has the gradients' norm (`global_norm` of those that `counted_mask` names) may hand it to the update
    as grad_norm=; without, clipping takes it anew.

    Args:
      total_updates: length of the run, for the schedule.
      shapes: nested dict of `jax.ShapeDtypeStruct`, one a parameter.
      axes: the same tree with each parameter's logical axis names, as ("layers", "embed", "mlp").
      balance_rate: `model.moe.balance_rate`; may be left out where no router has a balance bias.

    Gradients are normalised per tensor, then clipped by their global norm, then given to the optimizer. State and
    updates are at least float32 whatever the parameters are; `optax.apply_updates` rounds the sum to their dtype.
    The schedule counts calls, so a caller who rejects an update must also keep the old state. Frozen parameters
    have zero updates and no state, and do not count in the norm. Nor do balance biases, which move by `balance_rate`
    against the sign of their gradient (arXiv 2408.15664, algorithm 1): no schedule, clipping, decay or multiplier.
    """
    _check_axes(shapes, axes)
    trainable = trainable_mask(cfg, shapes)
    depths = _map_axes(stack_depth, axes)
    factors = lr_factors(cfg, shapes)
    parts = [
        _normalize(depths) if cfg.normalize_gradients else None,
        _clip(cfg.clip_norm, changed=cfg.normalize_gradients) if cfg.clip_norm else None,
        *_scale_by_optimizer(cfg, shapes, axes, depths, trainable),
        optax.add_decayed_weights(cfg.weight_decay, decay_mask(cfg, axes)) if cfg.weight_decay else None,
        _trust_ratio(depths, axes) if cfg.name == "lamb" else None,
        _scale_leaves(factors) if cfg.lr_multipliers else None,
        optax.scale_by_learning_rate(learning_rate(cfg, total_updates)),
    ]
    tx = optax.chain(*(part for part in parts if part is not None))
    own_rule = lambda a: "balance" if role(a) == "balance" else "trained"  # noqa: E731
    labels = jax.tree.map(lambda train, rule: rule if train else "frozen", trainable, _map_axes(own_rule, axes))
    kinds = set(jax.tree.leaves(labels))
    if kinds != {"trained"}:
        rules = {"trained": tx, "frozen": optax.set_to_zero()}
        if "balance" in kinds:
            rules["balance"] = _against_the_sign(balance_rate)
        tx = optax.partition(rules, labels)
    return _at_least_float32(tx)


def global_norm(tree: Tree, where: Tree | None = None) -> jax.Array:
    """L2 norm over all leaves, or over those where the tree of bools `where` is True; a float32 scalar."""
    if where is not None:
        tree = [x for x, keep in zip(jax.tree.leaves(tree), jax.tree.leaves(where), strict=True) if keep]
    return jnp.sqrt(sum(jnp.sum(jnp.square(at_least_float32(x))) for x in jax.tree.leaves(tree)))


def _scale_by_optimizer(
    cfg: OptimConfig, shapes: Tree, axes: Tree, depths: Tree, trainable: Tree
) -> list[optax.GradientTransformation]:
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
    match cfg.name:
        case "adamw" | "lamb":
            return [adam if cfg.bias_correction else _adam_as_it_starts(cfg)]
        case "lion":
            return [optax.scale_by_lion(cfg.beta1, cfg.beta2)]
        case "sgd":
            return [optax.trace(cfg.beta1)] if cfg.beta1 else []
        case "adafactor":
            _check_factoring(shapes, depths)
            return [optax.scale_by_factored_rms(decay_rate=0.8), _adafactor_step_size(depths)]
        case "muon":
            return [_muon(cfg, adam, shapes, axes, trainable)]
    raise ConfigError(f"optim.name={cfg.name!r} is not an optimizer")


def _adam_as_it_starts(cfg: OptimConfig) -> optax.GradientTransformation:
    """Adam whose averages, zero at first, are used as they are: BERT's optimizer (google-research/bert)."""
    base = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        _, state = base.update(updates, state, params)  # its own corrected update is not used, nor computed
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + cfg.eps), state.mu, state.nu), state

    return optax.GradientTransformation(base.init, update)


def _trust_ratio(depths: Tree, axes: Tree) -> optax.GradientTransformation:
    """Makes each tensor's update, layer by layer, as large as the tensor itself: LAMB (You et al. 2019, arXiv
    1904.00962, algorithm 2). Norms and biases keep theirs, as in the authors' code. optax's own takes a stack of layers
    for one tensor."""
    adapts = _map_axes(lambda a: role(a) != "vector", axes)

    def one(depth_adapts: tuple[int, bool], u: jax.Array, p: jax.Array) -> jax.Array:
        depth, adapt = depth_adapts
        if not adapt:
            return u
        norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(depth, x.ndim)), keepdims=True))  # noqa: E731
        size, change = norm(p), norm(u)
        return u * jnp.where((size > 0) & (change > 0), size / jnp.where(change > 0, change, 1.0), 1.0)

    is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
    table = jax.tree.map(lambda depth, adapt: (depth, adapt), depths, adapts)

    def ratio(updates: Tree, params: Tree) -> Tree:
        each = lambda entry, *nodes: jax.tree.map(functools.partial(one, entry), *nodes)  # noqa: E731
        return jax.tree.map(each, table, updates, params, is_leaf=is_pair)

    return optax.stateless(ratio)


def _muon(
    cfg: OptimConfig, adam: optax.GradientTransformation, shapes: Tree, axes: Tree, trainable: Tree
) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for matrices, each of a stack by itself; Adam for embeddings, heads and vectors.

    Updates are scaled by 0.2 * sqrt(max(rows, columns)), which gives them AdamW's size, so that one learning rate
    and weight decay serve both (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """
    labels = _map_axes(lambda a: "muon" if role(a) == "matrix" else "adam", axes)
    sides = jax.tree.map(
        lambda label, train, a: _matrix_sides(a) if label == "muon" and train else optax.MaskedNode(),
        labels, trainable, axes,
    )  # fmt: skip
    rows_columns = lambda x, side: max(math.prod(x.shape[i] for i in group) for group in side)  # noqa: E731
    size = jax.tree.map(
        lambda x, label, a: 0.2 * math.sqrt(rows_columns(x, _matrix_sides(a))) if label == "muon" else 1.0,
        shapes, labels, axes,
    )  # fmt: skip
    muon = optax.contrib.scale_by_muon(beta=cfg.beta1, weight_dimension_numbers=sides)
    return optax.partition({"muon": optax.chain(muon, _scale_leaves(size)), "adam": adam}, labels)


def _matrix_sides(axes: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers:
    """Which dimensions are the rows and which the columns: ("embed", "heads", "head_dim") is embed x (heads*head_dim).

    The residual stream's axis is one side where it comes first or last, else the first axis is.
    """
    first = stack_depth(axes)
    split = len(axes) - 1 if axes[-1] == "embed" and axes[first] != "embed" else first + 1
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, len(axes))))


def _adafactor_step_size(depths: Tree) -> optax.GradientTransformation:
    """Clips each tensor's update to RMS 1 and multiplies it by max(1e-3, RMS(parameter)), as T5 was trained.

    Shazeer and Stern 2018, arXiv 1804.04235, algorithm 4. Not optax's own, which take a stack of layers for one tensor.
    """

    def one(depth: int, u: jax.Array, p: jax.Array) -> jax.Array:
        own = tuple(range(depth, u.ndim))
        rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x), axis=own, keepdims=True))  # noqa: E731
        return u / jnp.maximum(1.0, rms(u)) * jnp.maximum(1e-3, rms(p))

    return optax.stateless(lambda updates, params: _map_table(one, depths, updates, params))


def _against_the_sign(rate: float | None) -> optax.GradientTransformation:
    if rate is None:
        raise ValueError("a router has a balance bias: make(...) needs balance_rate, the config's moe.balance_rate")
    return optax.stateless(lambda updates, _: jax.tree.map(lambda g: -rate * jnp.sign(g), updates))


def _normalize(depths: Tree) -> optax.GradientTransformation:
    """Divides each tensor's gradient, layer by layer, by its L2 norm plus 1e-6."""

    def one(depth: int, g: jax.Array) -> jax.Array:
        return g / (jnp.sqrt(jnp.sum(jnp.square(g), axis=tuple(range(depth, g.ndim)), keepdims=True)) + 1e-6)

    return optax.stateless(lambda updates, _: _map_table(one, depths, updates))


def _clip(max_norm: float, *, changed: bool) -> optax.GradientTransformationExtraArgs:
    """g * min(1, max_norm / norm): one product an element, where optax's clip divides, multiplies and selects.

    Where gradients were `changed` before they come here, the norm that the caller knows is not theirs.
    """

    def clip(
        updates: Tree, state: Any, params: Tree = None, *, grad_norm: jax.Array | None = None, **_: Any
    ) -> tuple[Tree, Any]:
        norm = global_norm(updates) if changed or grad_norm is None else grad_norm
        factor = jnp.minimum(1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), clip)


def _scale_leaves(factors: Tree) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: _map_table(lambda factor, u: factor * u, factors, updates))


def _map_table(f: Callable[..., jax.Array], table: Tree, *trees: Tree) -> Tree:
    """f(entry of the table, leaf, ...) over trees in which some of the table's leaves may be masked out."""
    return jax.tree.map(lambda entry, *nodes: jax.tree.map(functools.partial(f, entry), *nodes), table, *trees)


def _at_least_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    tx = optax.with_extra_args_support(tx)

    def update(updates: Tree, state: Any, params: Tree, **known: Any) -> tuple[Tree, Any]:
        wide = lambda tree: jax.tree.map(at_least_float32, tree)  # noqa: E731
        return tx.update(wide(updates), state, wide(params), **known)

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(jax.tree.map(at_least_float32, params)), update)


def _check_axes(shapes: Tree, axes: Tree) -> None:
    """Every parameter has exactly one axis name a dimension."""
    named = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    names = {path_name(path): a for path, a in named}
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        found = names.pop(path_name(path), None)
        if found is None or len(found) != len(x.shape):
            raise ValueError(f"parameter {path_name(path)} of shape {x.shape} has the logical axes {found}")
    if names:
        raise ValueError(f"logical axes without a parameter: {', '.join(names)}")


def _check_factoring(shapes: Tree, depths: Tree) -> None:
    """optax factors over the two largest dimensions, from 128 on; a stack axis among them would mix layers."""
    for (path, x), depth in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(depths), strict=True):
        own = sorted(x.shape[depth:])[-2:]
        if depth and max(x.shape[:depth]) >= max(128, min(own)):
            raise ConfigError(
                f"optim.name='adafactor': the parameter {path_name(path)} stacks {x.shape[:depth]} tensors of shape "
                f"{x.shape[depth:]}, and its statistics would be factored over the stack; set model.scan_layers=False "
                "or choose another optimizer"
            )


# ------------------------------------------------------------------------------------------- state shardings


def state_shardings(abstract_opt_state: Tree, abstract_params: Tree, param_shardings: Tree, replicated: Any) -> Tree:
    """A sharding for each leaf of the optimizer state, so that jit(init) does not replicate it.

    A leaf belongs to the parameter whose path ends the leaf's own. With that parameter's shape it takes its sharding;
    with one dimension less (Adafactor's row and column statistics) that sharding without the dimension, where it is
    clear which one is missing; all else (counts, coefficients) is `replicated`.
    """
    keystr = jax.tree_util.keystr
    table = {
        keystr(path): (x.shape, sharding)
        for (path, x), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract_params), jax.tree.leaves(param_shardings), strict=True
        )
    }

    def of(path: Any, leaf: Any) -> Any:
        owner = next((table[keystr(path[i:])] for i in range(len(path)) if keystr(path[i:]) in table), None)
        if owner is None:
            return replicated
        shape, sharding = owner
        if leaf.shape == shape:
            return sharding
        spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
        options = {spec[:i] + spec[i + 1 :] for i in range(len(shape)) if leaf.shape == shape[:i] + shape[i + 1 :]}
        if len(options) != 1:
            return replicated
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*options.pop()))

    return jax.tree_util.tree_map_with_path(of, abstract_opt_state)
