"""Where a step does not fit: by how much, the largest tensors, and changes that make it fit, each compiled."""

import re

from llm_jax.errors import UserError
from llm_jax.plan.candidates import Candidate, Changes, changed, weigh
from llm_jax.plan.compile import Compiled
from llm_jax.plan.estimate import Estimate
from llm_jax.plan.hardware import GIB
from llm_jax.plan.quick import Sizes, kept, layer_weights, sizes
from llm_jax.plan.search import Tried, try_all
from llm_jax.plan.setting import Setting, make_setting

WANTED = 3


def needed_bytes(setting: Setting, compiled: Compiled, found: Estimate | None) -> float:
    """What the step needs of each device. A compiler that refuses a program says its temporaries; the state is ours."""
    if found is not None:
        return found.memory.total
    state = setting.state_bytes()
    said = re.search(r"(?:temporaries|Used)\W+([\d.]+)([MGT])", compiled.refused)
    if said:
        temporary = float(said[1]) * {"M": 2**20, "G": GIB, "T": 2**40}[said[2]]
        return temporary + state["parameters"] + state["optimizer"]
    return float("nan")


def large_tensors(setting: Setting) -> list[tuple[float, str]]:
    """(bytes, what it is) of what takes most, by arithmetic, largest first."""
    size, state, item = sizes(setting), setting.state_bytes(), 2
    rows = [(bytes_, name) for name, bytes_ in state.items()]
    for name, numbers in kept(setting.cfg.model, size).items():
        rows.append((numbers * size.tokens * size.layers * item, f"saved {name} of {size.layers:g} layers"))
    rows.append((layer_weights(setting, size) * item, "gathered weights of a layer"))
    rows.append((logits_bytes(setting, size), "logits"))
    return sorted(rows, reverse=True)


def logits_bytes(setting: Setting, size: Sizes) -> float:
    length, chunk = setting.cfg.data.sequence_length, setting.cfg.train.loss_chunk
    parts = setting.layout.activation_pieces("vocab")
    return size.tokens * (chunk or length) / length * setting.cfg.model.vocab_size * 4 / parts


def remedies(setting: Setting) -> list[Candidate]:
    """Single changes, and pairs of them, that fit by arithmetic; the fastest first, each another key."""
    cfg, mesh = setting.cfg, setting.mesh
    own = cfg.train.global_batch_size // setting.layout.batch_shards
    single: list[Changes] = [
        {"train.accumulation": n} for n in (2, 4, 8, 16, 32, 64) if n > cfg.train.accumulation and own % n == 0
    ]
    if cfg.model.remat != "full":
        single.append({"model.remat": "full", "model.remat_save": ()})
    if not cfg.train.loss_chunk:
        single.append({"train.loss_chunk": 512})
    if mesh["data"] > 1:
        single.append({"mesh.data": 1, "mesh.fsdp": mesh["fsdp"] * mesh["data"], "mesh.across_slices": ()})
    for n in (2, 4, 8):
        if mesh["fsdp"] % n == 0 and setting.machine.domain % (n * mesh["tensor"]) == 0:
            rules = ("residual_length=sequence+tensor",)
            single.append({"mesh.fsdp": mesh["fsdp"] // n, "mesh.tensor": mesh["tensor"] * n,
                           "mesh.activation_rules": rules})  # fmt: skip
    if cfg.model.remat == "full":
        single.append({"model.remat": "names", "model.remat_save": ("layer_input=host",)})
    single.append({"train.global_batch_size": cfg.train.global_batch_size // 2})
    found = unlike([one for changes in single if (one := possible(setting, changes)) is not None and one.fits])
    if len(found) < WANTED:  # two at once
        pairs = [a | b for i, a in enumerate(single) for b in single[i + 1 :] if not a.keys() & b.keys()]
        found += [one for changes in pairs if (one := possible(setting, changes)) is not None and one.fits]
    return unlike(sorted(found, key=lambda one: one.seconds))


def possible(setting: Setting, changes: Changes) -> Candidate | None:
    try:
        base = make_setting(changed(setting.cfg, changes), setting.machine)
    except UserError:
        return None
    return weigh(base, changes)


def unlike(found: list[Candidate]) -> list[Candidate]:
    """Of several that change the same keys, the first alone."""
    chosen: dict[tuple[str, ...], Candidate] = {}
    for one in found:
        chosen.setdefault(tuple(sorted(one.changes)), one)
    return list(chosen.values())


def verified(setting: Setting) -> list[Tried]:
    """Up to three remedies that were compiled and fit. More are compiled where some turn out not to."""
    waiting, good = remedies(setting), []
    while waiting and len(good) < WANTED:
        batch, waiting = waiting[: WANTED - len(good)], waiting[WANTED - len(good) :]
        good += [one for one in try_all(batch) if one.found is not None and one.found.fits]
    return good
