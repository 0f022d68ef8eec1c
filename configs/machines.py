"""Machines, what they can do, and the mesh that a model takes on each: `--config=llama3/70b:v5p-512`.

A machine's name says how many there are:

    v5e-256      a TPU slice; the number counts chips on v5e and v6e, TensorCores (two a chip) on v4, v5p and tpu7x
    v5e-256x4    four such slices
    h100x64      GPUs, in nodes of 8

`fit` chooses, `launch/meshes.md` explains. Nothing here looks at the devices there are: training refuses a mesh that
does not fit them.
"""

GIB, GB = 2**30, 10**9

# Of a chip: dense bfloat16 FLOP/s; bytes of memory; bytes/s that it sends while it receives as many, `fast` over all
# its links inside a slice or node, `slow` between slices or nodes. Sources:
# - TPUs: the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" of Google Cloud's documentation. `fast` is
#   half of the bidirectional figure, `slow` the data center network of a chip, or of a pod over its 256 chips. v4: 6
#   links of 50 GB/s (Jouppi et al. 2023, arXiv 2304.01433; not confirmed, but it agrees with the page's bisection), and
#   nothing is said there of the network between slices.
# - GPUs: NVIDIA's data sheets of A100 80GB, H100 SXM, H200 SXM and HGX B200 (half of the sparse FLOP/s, half of
#   NVLink's bidirectional figure). `slow` is one network card a GPU, of 200 Gbit/s beside A100 and 400 beside the
#   others, as in the DGX systems and in the systems described in MLPerf's results: your cluster's may differ.
COLUMNS = ("kind", "flops", "hbm", "fast", "slow", "cores", "devices", "node")
MACHINES = {
    # kind as JAX says it, TensorCores a chip (0: a GPU), devices that JAX sees of a chip, GPUs of a node
    "v4": ("TPU v4", 275e12, 32 * GIB, 300 * GB, 0, 2, 1, 0),  # both cores are one device (Megacore), its usual mode
    "v5e": ("TPU v5 lite", 197e12, 16 * GB, 200 * GB, 3.125 * GB, 1, 1, 0),
    "v5p": ("TPU v5", 459e12, 95 * GIB, 600 * GB, 6.25 * GB, 2, 1, 0),
    "v6e": ("TPU v6 lite", 918e12, 32 * GIB, 400 * GB, 12.5 * GB, 1, 1, 0),
    "tpu7x": ("TPU7x", 2307e12, 192 * GIB, 600 * GB, 12.5 * GB, 2, 2, 0),
    "a100": ("NVIDIA A100", 312e12, 80 * GB, 300 * GB, 25 * GB, 0, 1, 8),
    "h100": ("NVIDIA H100 80GB HBM3", 989e12, 80 * GB, 450 * GB, 50 * GB, 0, 1, 8),
    "h200": ("NVIDIA H200", 989e12, 141 * GB, 450 * GB, 50 * GB, 0, 1, 8),
    "b200": ("NVIDIA B200", 2250e12, 180 * GB, 900 * GB, 50 * GB, 0, 1, 8),
}

EXAMPLES = "v4-128, v5e-256, v5p-64, v6e-256, tpu7x-128, v5e-256x4 (four slices), a100x8, h100x64, h200x8, b200x8"


def machine(name: str) -> dict:
    """The facts of a machine by its name, those of a chip divided among the devices that JAX sees of it.

    Returns:
      flops, hbm, fast and slow of a device; devices of one slice or node ("domain"), and how many domains ("domains").

    Raises:
      ValueError: there is no such machine, with those there are.
    """
    family, dash, size = name.partition("-")
    if not dash:
        family, _, size = name.partition("x")
    count, times, slices = size.partition("x")
    chip = dict(zip(COLUMNS, MACHINES.get(family, ()), strict=False))
    numbers = (count, slices) if times else (count,)
    if not chip or bool(dash) != bool(chip["cores"]) or not all(n.isdigit() and int(n) for n in numbers):
        raise ValueError(f"there is no machine {name!r}; give one of {', '.join(MACHINES)} with its size: {EXAMPLES}")
    if chip["cores"]:
        if int(count) % chip["cores"]:
            raise ValueError(f"machine {name!r}: the number counts TensorCores, two a chip; give an even one")
        domain, domains = int(count) // chip["cores"] * chip["devices"], int(slices or 1)
    else:
        domain = min(int(count), chip["node"])
        if times or int(count) % domain:
            raise ValueError(f"machine {name!r}: GPUs come in nodes of {chip['node']}; give a multiple, as h100x64")
        domains = int(count) // domain
    facts = {key: chip[key] / chip["devices"] for key in ("flops", "hbm", "fast", "slow")}
    return facts | {"name": name, "domain": domain, "domains": domains, "devices": domain * domains}


# ---------------------------------------------------------------------------------------------------- models


def model_size(*, layers, width, mlp, heads, kv_heads, vocab, length, experts=0, top_k=0, split=0) -> dict:
    """What decides a mesh: the sizes of a LLaMA-like decoder, gated MLP, untied head, heads of 128 or width / heads.

    `split`: what the fsdp axis must split in equal parts beside the width; 0: nothing.
    """
    return dict(layers=layers, width=width, mlp=mlp, heads=heads, kv_heads=kv_heads, vocab=vocab, length=length,
                experts=experts, top_k=top_k, split=split or width)  # fmt: skip


def parameters(size: dict) -> int:
    """How many parameters the model has."""
    width, kv_width = size["width"], size["width"] * size["kv_heads"] // size["heads"]
    attention = 2 * width * width + 2 * width * kv_width
    mlp = 3 * width * size["mlp"] * max(size["experts"], 1) + width * size["experts"]  # and the router
    return size["layers"] * (attention + mlp + 2 * width) + 2 * size["vocab"] * width + width


# ----------------------------------------------------------------------------------------- arithmetic intensity


def fsdp_tokens(facts: dict, size: dict, *, expert: int = 1, tensor: int = 1, slow: bool = False) -> float:
    """Tokens a device must work on at a time so that gathering sharded weights is hidden behind products.

    A matrix of P weights costs 2 P FLOPs a token and 2 P bytes (bfloat16) to gather: tokens > flops / bandwidth. The
    backward pass does twice the products, and gathers again and scatters the gradients: the same. A tensor axis divides
    what a device gathers, and so does an expert axis; a token meets k of the E experts that move. With `slow`, shards
    lie in several slices or nodes, and each takes in all weights once, over the links of all its devices.
    """
    met = size["experts"] / size["top_k"] if size["experts"] else 1
    inside = facts["flops"] / facts["fast"] * max(met / expert, 1) / tensor
    return max(inside, facts["flops"] / (facts["slow"] * facts["domain"]) * met) if slow else inside


def data_tokens(facts: dict) -> float:
    """Tokens a device must work on at a time so that summing gradients between slices or nodes is hidden.

    Of P weights each device of a domain of n holds P / n, and sends 2 P / n bytes twice (bfloat16; reduce-scatter and
    all-gather) beside 6 P FLOPs a token: tokens > 2/3 flops / (n x bandwidth). The sum is made once a micro-batch, and
    in a pipeline once a turn, so these are the tokens of a micro-batch, or of a turn.
    """
    return 2 / 3 * facts["flops"] / (facts["slow"] * facts["domain"])


def tensor_limit(facts: dict, size: dict) -> float:
    """The largest tensor axis at which the MLP's products hide the movement of activations.

    A gated MLP costs 6 D F / Y FLOPs a token and device, and gathers and scatters 2 D bytes each:
    Y < 1.5 F bandwidth / flops.
    """
    return 1.5 * size["mlp"] * facts["fast"] / facts["flops"]


def ring_tokens(facts: dict, size: dict) -> float:
    """Tokens of a row that each device must hold so that ring attention hides the movement of keys and values.

    With t tokens a device and N heads of H, K of them for keys, a turn costs 2 t^2 N H FLOPs (causal, balanced) and
    moves 4 t K H bytes: t > 2 (K / N) flops / bandwidth.
    """
    return 2 * size["kv_heads"] / size["heads"] * facts["flops"] / facts["fast"]


def expert_width(facts: dict, *, slow: bool = False) -> float:
    """The smallest MLP width of an expert at which its products hide the two all-to-alls.

    For each expert that a token goes to: 6 D F FLOPs, and 2 D bytes there and 2 D back: F > 2/3 flops / bandwidth.
    """
    return 2 / 3 * facts["flops"] / facts["slow" if slow else "fast"]


def bubble(stages: int, repeats: int, microbatches: int) -> float:
    """The share of a pipeline's time in which a stage waits: (S - 1) / (R M + S - 1) (GPipe, arXiv 1811.06965)."""
    return (stages - 1) / (repeats * microbatches + stages - 1)


# ------------------------------------------------------------------------------------------------- the choice

STATE_BYTES = 16  # a parameter: float32 weight and gradient, Adam's two float32 moments
SUM_BYTES = 4  # a parameter with accumulation: the sum of the micro-batches' gradients, beside the gradient of one
USABLE = 0.9  # of the memory; the rest is the runtime's, and fragments


def exchanged(size: dict, expert: int) -> int:
    """Rows that a device's expert products have room for, for each of its tokens.

    On one device as many as a token has choices. With an expert axis each device keeps for each other one a block with
    room for every choice that could fall on it, so that nothing is ever dropped: expert * min(k, E / expert).
    """
    return size["top_k"] if expert == 1 else expert * min(size["top_k"], size["experts"] // expert)


def row_bytes(size: dict, tensor: int, expert: int = 1) -> float:
    """Memory that a row takes under remat=full: every block's input, and one block's inside, forward and backward.

    A block's inside is 4 widths and 3 MLPs a token; of experts, 2 widths (in and out) and 3 MLPs for each row of their
    products. The logits of a chunk, which exist at another time, take less. The residual stream is split over the
    tensor axis too (mesh.activation_rules), so all of it is divided.
    """
    products = exchanged(size, expert) * (2 * size["width"] + 3 * size["mlp"]) if size["experts"] else 3 * size["mlp"]
    inside = 2 * (4 * size["width"] + products)
    return 2 * size["length"] * (size["layers"] * size["width"] + inside) / tensor


def working_bytes(size: dict, tensor: int, expert: int = 1) -> float:
    """Memory for whole weights: those of a layer, gathered, and their gradient before it is scattered, in bfloat16.

    Or, if they are more, those of the head and their gradient, which is summed in float32.
    """
    head = size["width"] * size["vocab"]
    mlp = 3 * size["width"] * size["mlp"] * max(size["experts"], 1) / expert
    attention = 2 * size["width"] ** 2 * (1 + size["kv_heads"] / size["heads"])
    return max(4 * (attention + mlp), 6 * head) / tensor


# Held against the TPU compiler (jax 0.10.2, libtpu 0.0.42.1), which names a sum where it refuses a program: LLaMA-3 8B
# on v5p-64 with all its 32 rows a chip at once takes 121.2 GiB of temporaries; by these functions it is 125.9.
def used_bytes(size: dict, *, shards: int, tensor: int, expert: int, rows: int, accumulation: int) -> float:
    """Memory of a device that has `rows` at a time and holds its part, of `shards`, of the state."""
    state = (STATE_BYTES + SUM_BYTES * (accumulation > 1)) * parameters(size) / shards
    return state + working_bytes(size, tensor, expert) + rows * row_bytes(size, tensor, expert)


def fit(name: str, size: dict, rows: int) -> dict:
    """Mesh sizes and accumulation for a model on a machine.

    Parameters are sharded (fsdp) inside a slice or node and copied between them (data) where their state takes at
    most half of the memory, else sharded over all devices. The batch is cut into the fewest micro-batches that fit.
    Tensor parallelism comes only where a row is too large for a device, or there are more devices than rows. Experts
    are gathered like other weights where a micro-batch hides that; where it does not, they get the smallest expert
    axis that helps, inside the slice or node, for its exchange takes room (see `exchanged`).

    Args:
      name: of the machine; "" for any: all devices shard the parameters.
      size: from `model_size`.
      rows: of the global batch.

    Returns:
      {"mesh": {...}, "train": {"accumulation": n}}, to be laid over a config.

    Raises:
      ValueError: no such machine, or the model does not fit on it.
    """
    if not name:
        return {"mesh": dict(data=1, fsdp=-1), "train": dict(accumulation=1)}
    facts = machine(name)
    state = STATE_BYTES * parameters(size)
    most = facts["domain"] if state / facts["domain"] <= facts["hbm"] / 2 else facts["devices"]

    def shards(expert: int, tensor: int) -> int:
        """Over so many devices, for the fsdp axis splits the width in equal parts."""
        return min(most, common_power(size["width"], size["split"]) * expert * tensor)

    fitting = []
    for expert in powers(common_power(size["experts"], facts["domain"]) if size["experts"] else 1):
        for tensor in powers(common_power(size["kv_heads"], facts["domain"] // expert)):
            if accumulation := fewest_pieces(facts, size, rows, shards(expert, tensor), expert, tensor):
                fitting.append((expert, tensor, accumulation))
                break
    if not fitting:
        raise ValueError(
            f"machine {name!r} does not hold this run: {parameters(size) / 1e9:.1f}B parameters take "
            f"{state / shards(1, 1) / GIB:.0f} of each device's {facts['hbm'] / GIB:.0f} GiB, and {rows} rows of "
            f"{size['length']} tokens do not split over its devices and fit beside them; give a larger machine, or set "
            "the mesh by hand"
        )

    def hidden(choice: tuple[int, int, int]) -> bool:
        expert, tensor, accumulation = choice
        tokens = rows * size["length"] / facts["devices"] / accumulation
        spread = shards(expert, tensor) > facts["domain"]
        return tokens >= fsdp_tokens(facts, size, expert=expert, tensor=tensor, slow=spread)

    expert, tensor, accumulation = next(filter(hidden, fitting), fitting[0])
    return {"mesh": mesh_keys(facts, shards(expert, tensor), expert, tensor), "train": dict(accumulation=accumulation)}


def fewest_pieces(facts: dict, size: dict, rows: int, shards: int, expert: int, tensor: int) -> int:
    """The fewest micro-batches that fit, or 0."""
    batch_shards = facts["devices"] // tensor
    if rows % batch_shards:
        return 0
    own = rows // batch_shards
    for pieces in (n for n in range(1, own + 1) if not own % n):
        used = used_bytes(size, shards=shards, tensor=tensor, expert=expert, rows=own // pieces, accumulation=pieces)
        if used <= USABLE * facts["hbm"]:
            return pieces
    return 0


def mesh_keys(facts: dict, shards: int, expert: int, tensor: int) -> dict:
    """The config's mesh: parameters over `shards` devices, with what goes across slices or nodes said."""
    sizes = dict(data=facts["devices"] // shards, fsdp=shards // (expert * tensor), expert=expert, tensor=tensor)
    rules = ("residual_length=sequence+tensor",) if tensor > 1 else ()
    if facts["domains"] == 1:
        return sizes | dict(activation_rules=rules)
    over = dict(fsdp=max(shards // facts["domain"], 1))  # of the slices or nodes; the rest of them hold copies
    over["data"] = facts["domains"] // over["fsdp"]
    return sizes | dict(activation_rules=rules, across_slices=tuple(f"{axis}={n}" for axis, n in over.items() if n > 1))


def common_power(a: int, b: int) -> int:
    """The largest power of two that divides both."""
    return min(a & -a, b & -b)


def powers(largest: int) -> list[int]:
    """1, 2, 4, ... up to `largest`, a power of two."""
    return [2**n for n in range(largest.bit_length())]
