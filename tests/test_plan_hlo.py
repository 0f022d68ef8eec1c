"""Compiled texts are read as they are meant: loops, products, groups of devices, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.plan import hlo, network
from llm_jax.plan.bytes import touched_bytes
from llm_jax.plan.flops import instruction_flops, kernel_flops, valid_places
from llm_jax.plan.hardware import topology
from llm_jax.plan.hlo import Shape

# A loop over 8 that the compiler has unrolled by two, as a TPU program prints it.
LOOP = """HloModule jit_step, is_scheduled=true, num_partitions=4

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %kept = s32[]{:T(128)} copy(%i)
  %next = s32[]{:T(128)} add(%kept, %two)
  %y = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%square, {"estimated_cycles":"100"}
  ROOT %t = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%next, %y)
}

%square (q: bf16[8,16]) -> bf16[8,16] {
  %q = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %m = bf16[8,16]{1,0:T(8,128)(2,1)} multiply(%q, %q)
}

%condition (c: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %c = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%zero, %a)
  %kernel = bf16[8,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/pallas_call"}
  %loop = (s32[], bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  ROOT %out = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_a_module_is_read():
    program = hlo.parse(LOOP)
    assert (program.entry, program.partitions, len(program.computations)) == ("main", 4, 4)
    main = program.computations["main"]
    assert main["a"].shapes == (Shape("bf16", (8, 16)),)
    assert main["kernel"].target == "tpu_custom_call" and main["kernel"].op_name == "jit(step)/pallas_call"
    assert main["loop"].shapes == (Shape("s32", ()), Shape("bf16", (8, 16)))
    assert program.computations["body"]["x"].shapes[0].space == 1
    assert main["out"].index == 1 and main["out"].root and not main["loop"].root


def test_a_loop_turns_as_often_as_its_condition_and_its_step_say():
    program = hlo.parse(LOOP)
    assert program.trips(program.computations["main"]["loop"]) == 4  # 0, 2, 4, 6
    assert sum(one.cycles * times for one, _, times in program.every()) == 400
    le = hlo.parse(LOOP.replace("direction=LT", "direction=LE"))
    assert le.trips(le.computations["main"]["loop"]) == 5
    told = hlo.parse(LOOP.replace('op_name="jit(step)/while"}', '}, backend_config={"known_trip_count":{"n":"7"}}'))
    assert told.trips(told.computations["main"]["loop"]) == 7


@pytest.mark.parametrize("text", ["", "module @jit_step {", "HloModule empty"])
def test_what_is_no_module_is_refused(text):
    with pytest.raises(ValueError, match="HloModule|ENTRY"):
        hlo.parse(text)


# ------------------------------------------------------------------------------------------------------- products


def entry(*lines: str) -> hlo.Program:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"HloModule m, num_partitions=1\n\nENTRY %main (a: f32[1]) -> f32[1] {{\n{body}\n}}\n")


def flops_of(*lines: str) -> float:
    program = entry(*lines)
    return sum(instruction_flops(program, one, "main") for one in program.computations["main"].values())


def test_products_are_counted_from_their_shapes():
    lines = ["%a = f32[3,4,5]{2,1,0} parameter(0)", "%b = f32[3,5,6]{2,1,0} parameter(1)"]
    dot = "ROOT %c = f32[3,4,6]{2,1,0} dot(%a, %b), lhs_contracting_dims={2}, rhs_contracting_dims={1}"
    assert flops_of(*lines, dot) == 2 * 3 * 4 * 5 * 6
    plain = ["%a = bf16[8,16]{1,0} parameter(0)", "%b = bf16[16,32]{1,0} parameter(1)"]
    assert flops_of(*plain, "ROOT %c = bf16[8,32]{1,0} convolution(%a, %b), dim_labels=bf_io->bf") == 2 * 8 * 16 * 32


def test_a_window_over_the_batch_counts_its_real_places_alone():
    """Two matrices of a batch by two others: 2 x (8, 16) times (16, 4), written as a dilated convolution."""
    lines = ["%a = bf16[2,8,16]{2,1,0} parameter(0)", "%b = bf16[2,16,4]{2,1,0} parameter(1)"]
    window = "window={size=2 stride=1 pad=0_0 lhs_dilate=2}"
    one = f"ROOT %c = bf16[2,8,4]{{2,1,0}} convolution(%a, %b), {window}, dim_labels=0bf_0io->0bf"
    assert flops_of(*lines, one) == 2 * 2 * 8 * 16 * 4
    contracted = "ROOT %c = bf16[1,8,4]{2,1,0} convolution(%a, %b), window={size=2}, dim_labels=0bf_0io->0bf"
    assert flops_of(*lines, contracted) == 2 * 2 * 8 * 16 * 4  # the batch is summed over


def test_valid_places_are_those_of_a_convolution():
    rng = np.random.default_rng(0)
    for _ in range(20):
        given, size, stride, low, dilation, kernel_dilation = (int(rng.integers(1, n)) for n in (6, 5, 3, 4, 3, 3))
        spread = (given - 1) * dilation + 1
        out = max((spread + 2 * low - (size - 1) * kernel_dilation - 1) // stride + 1, 1)
        ones = jax.lax.conv_general_dilated(
            jnp.ones((1, 1, given)), jnp.ones((1, 1, size)), (stride,), [(low, low)], (dilation,), (kernel_dilation,)
        )
        if ones.shape[-1] == out:
            assert valid_places(out, size, given, stride, low, dilation, kernel_dilation) == float(ones.sum())


def test_kernels_are_counted_by_their_kind():
    def kernel(name: str, operands: list[str], rest: str = "", target: str = "tpu_custom_call"):
        lines = [f"%o{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
        given = ", ".join(f"%o{i}" for i in range(len(operands)))
        program = entry(
            *lines, f'ROOT %{name} = bf16[8]{{0}} custom-call({given}), custom_call_target="{target}"{rest}'
        )
        main = program.computations["main"]
        return kernel_flops(main[name], main)

    mask, query, keys = "s8[1,4,4]{2,1,0}", "bf16[2,8,2048,128]{3,2,1,0}", "bf16[2,2,2048,128]{3,2,1,0}"
    pairs = 2 * 8 * 2048**2 * 128 * (1 + 1 / 4)  # 2 FLOPs x half of the blocks and the diagonal's other half
    assert kernel("splash_mha_fwd_residuals.1", [mask, query, keys, keys]) == ("attention", 2 * pairs)
    assert kernel("splash_mha_dq_no_residuals.1", [mask, query, keys, keys]) == ("attention backward", 3 * pairs)
    fused = ', frontend_attributes={x="\\"use_fused_bwd_kernel\\": true"}'
    assert kernel("splash_mha_dkv.1", [mask, query, keys, keys], fused) == ("attention backward", 5 * pairs)
    rows, experts = "bf16[64,16]{1,0}", "bf16[8,16,32]{2,1,0}"
    assert kernel("ragged-dot-none", [rows, experts]) == ("grouped product", 2.0 * 64 * 16 * 32)
    assert kernel("gmm.1", [rows, "bf16[64,32]{1,0}"]) == ("grouped product", 2.0 * 64 * 16 * 32)
    cudnn = ["bf16[2,2048,8,128]{3,2,1,0}"] * 3
    causal = ', backend_config={"mask_type": "CAUSAL"}'
    whole = 2 * 2 * 2.0 * 8 * 2048**2 * 128
    assert kernel("f.1", cudnn, causal, "__cudnn$fmhaSoftmax") == ("attention", whole / 2)
    assert kernel("f.1", cudnn, "", "__cudnn$fmhaScaleBiasSoftmaxBackward") == ("attention backward", 2.5 * whole)
    assert kernel("mine.1", [rows]) == ("other", 0.0)


# ---------------------------------------------------------------------------------------------------------- bytes


def test_a_fusion_reads_the_slice_that_it_takes_and_writes_the_one_it_replaces():
    text = """HloModule m, num_partitions=1

%take (p0: f32[10,100], p1: s32[]) -> f32[1,100] {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
}

%put (q0: f32[10,100], q1: f32[1,100], q2: s32[]) -> f32[10,100] {
  %q0 = f32[10,100]{1,0} parameter(0)
  %q1 = f32[1,100]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  %seen = f32[10,100]{1,0} bitcast(%q0)
  ROOT %u = f32[10,100]{1,0} dynamic-update-slice(%seen, %q1, %q2, %none)
}

ENTRY %main (a: f32[10,100], i: s32[]) -> f32[10,100] {
  %a = f32[10,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,100]{1,0} fusion(%a, %i), kind=kLoop, calls=%take
  %b = f32[10,100]{1,0} fusion(%a, %row, %i), kind=kLoop, calls=%put
  ROOT %c = f32[10,100]{1,0} add(%b, %b)
}
"""
    program = hlo.parse(text)
    main = program.computations["main"]
    assert touched_bytes(program, main["row"], "main") == 400 + 4 + 400  # a row, its number, the result
    assert touched_bytes(program, main["b"], "main") == 400 + 4 + 400  # in place
    assert touched_bytes(program, main["c"], "main") == 3 * 4000


# ------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_are_read_in_every_spelling(text, groups):
    assert network.device_groups(f", channel_id=1, {text}, dimensions={{0}}", 4, False).tolist() == groups


def test_groups_agree_with_a_program_that_was_compiled():
    """The axis that a psum goes over is the one that it names, in the compiler's own text."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))
    given = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec("data", None))
    text = jax.jit(lambda x: x * 2, out_shardings=whole).lower(given).compile().as_text()
    program = hlo.parse(text)
    on = network.placed(topology("h100:1x8"), {"data": 2, "fsdp": 4})
    found = [
        network.collective(one, program.computations[name], on, 1.0)
        for one, name, _ in program.every()
        if network.kind_of(one)
    ]
    assert [(one.kind, one.axes, one.size) for one in found] == [("all-gather", "fsdp", 4)]
    assert found[0].bytes == 4 * 8 * 4 and found[0].sent == 4 * 8 * 4 * 3 / 4


def time_of(
    kind: str, sent: float, groups: list[list[int]], machine: str, mesh: dict[str, int], slices: int = 1
) -> float:
    on = network.placed(topology(machine, slices), mesh)
    return network.seconds(kind, sent, np.array(groups), on)


def test_a_ring_uses_all_the_links_that_its_devices_have():
    everyone = [list(range(64))]
    # v5p: six links of 100 GB/s; v5e: a part of a pod is no torus, so a line each way is one link.
    assert time_of("all-gather", 600e9, everyone, "v5p:4x4x4", {"fsdp": 64}) == pytest.approx(1.0)
    assert time_of("all-gather", 100e9, everyone, "v5e:8x8", {"fsdp": 64}) == pytest.approx(1.0)
    assert time_of("all-gather", 200e9, [list(range(256))], "v5e:16x16", {"fsdp": 256}) == pytest.approx(1.0)
    one_axis = [[4 * i + j for j in range(4)] for i in range(16)]
    assert time_of("all-gather", 200e9, one_axis, "v5p:4x4x4", {"fsdp": 16, "tensor": 4}) == pytest.approx(1.0)
    assert time_of("collective-permute", 100e9, one_axis, "v5p:4x4x4", {"fsdp": 16, "tensor": 4}) == pytest.approx(1.0)
    assert time_of("all-gather", 450e9, [list(range(8))], "h100:1x8", {"fsdp": 8}) == pytest.approx(1.0)


def test_between_nodes_each_device_sends_its_share():
    across = [[i, 8 + i] for i in range(8)]  # one of each node: no other shares its network card
    sent = 100e9  # (n-1)/n of 200 GB
    assert time_of("all-gather", sent, across, "h100:2x8", {"data": 2, "fsdp": 8}) == pytest.approx(100e9 / 50e9)
    # All 16: half of it comes from the other node, over 8 cards of 50 GB/s; NVLink, which it all passes, takes longer.
    assert time_of("all-gather", 187.5e9, [list(range(16))], "h100:2x8", {"fsdp": 16}) == pytest.approx(187.5 / 450)
    halves = [[i, i + 1, i + 8, i + 9] for i in range(0, 8, 2)]  # two of each node: two cards
    assert time_of("all-gather", 75e9, halves, "h100:2x8", {"data": 2, "fsdp": 8}) == pytest.approx(50 / 2 / 50)
    slices = time_of("all-reduce", 1e9, [[0, 64]], "v5p:4x4x4", {"data": 2, "fsdp": 64}, slices=2)
    assert slices == pytest.approx(1 / 6.25)
