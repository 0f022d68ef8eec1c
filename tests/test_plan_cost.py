"""A program's time is what its schedule makes of work and network, by hand on small texts."""

import pytest

from llm_jax import cli
from llm_jax.plan import hlo
from llm_jax.plan.cost import Constants, step_times
from llm_jax.plan.hardware import topology
from llm_jax.plan.network import placed

SIMPLE = Constants(cycles=1.0, matrix=1.0, memory=1.0, links=1.0, kernels={"attention": 0.5}, launch=0.0)
GATHER = "replica_groups=[1,4]<=[4], dimensions={0}"
BYTES = 4 * 10**6  # of a device's piece; three of the four pieces are sent over a line: v5e:2x2 has no ring
SECONDS = 3 * BYTES / (2 * 50e9)  # two dimensions of one link each


def times_of(*lines: str, computations: str = "", machine: str = "v5e:2x2", slices: int = 1):
    body = "\n".join(f"  {line}" for line in lines)
    text = f"HloModule m, num_partitions=4\n\n{computations}\nENTRY %main (a: f32[1]) -> f32[1] {{\n{body}\n}}\n"
    mesh = {"data": slices, "fsdp": 4}
    return step_times(hlo.parse(text), placed(topology(machine, slices), mesh), SIMPLE)


def work(name: str, seconds: float, operands: str = "%a") -> str:
    """An instruction that takes so long on v5e, by the compiler."""
    cycles = round(seconds * 1.5e9)
    return f'%{name} = f32[1]{{0}} negate({operands}), backend_config={{"estimated_cycles":"{cycles}"}}'


PIECE = "%a = f32[1000000]{0} parameter(0)"
START = f"%s = (f32[1000000]{{0}}, f32[4000000]{{0}}) all-gather-start(%a), channel_id=1, {GATHER}"
DONE = "%d = f32[4000000]{0} all-gather-done(%s)"


def test_a_collective_runs_beside_what_stands_between_its_start_and_its_done():
    for between in (SECONDS / 2, 2 * SECONDS):
        times = times_of(PIECE, START, work("w", between), DONE, work("v", SECONDS))
        assert times.memory == pytest.approx(between + SECONDS, rel=1e-3)
        assert times.waited == pytest.approx(max(SECONDS - between, 0), rel=1e-3)
        (moved,) = times.moved.values()
        assert (moved.count, moved.bytes) == (1, 3 * BYTES)
        assert moved.seconds == pytest.approx(SECONDS) and moved.waited == pytest.approx(times.waited)
        assert times.total == pytest.approx(times.busy + times.waited)


def between_slices(name: str, slices: str) -> list[str]:
    """A sum over slices as a TPU's program has it: what is sent, what is received, and where it is waited for."""
    said = (
        f'is_host_transfer=true, frontend_attributes={{_xla_host_transfer_rendezvous="all-reduce.{name}_0",'
        f'_xla_megascale_target="{{{slices}}}x{{0:3}}",_xla_megascale_transfer_type="ALL_REDUCE"}}'
    )
    return [
        f"%after{name} = token[] after-all()",
        f"%send{name} = (f32[1000000]{{0}}, u32[], token[]) send(%a, %after{name}), channel_id=2, {said}",
        f"%recv{name} = (f32[1000000]{{0}}, u32[], token[]) recv(%after{name}), channel_id=1, {said}",
        f"%sent{name} = token[] send-done(%send{name}), channel_id=2, is_host_transfer=true",
        f"%got{name} = (f32[1000000]{{0}}, token[]) recv-done(%recv{name}), channel_id=1, is_host_transfer=true",
    ]


@pytest.mark.parametrize("slices", [2, 4])
def test_a_sum_over_slices_takes_the_network_between_them(slices):
    """Its own time by the slow network, hidden by what stands between; and beside it a gather inside of the slice."""
    machine = topology("v5e:2x2", slices)
    sent = 2 * (slices - 1) / slices * BYTES
    seconds = sent / machine.hardware.slow
    first = between_slices("x", ",".join(map(str, range(1, slices + 1))))
    times = times_of(PIECE, *first[:3], work("w", seconds / 4), START, DONE, *first[3:], slices=slices)
    moved = times.moved["all-reduce", "data"]
    assert (moved.count, moved.bytes) == (1, sent) and moved.seconds == pytest.approx(seconds)
    assert moved.waited == pytest.approx(seconds - seconds / 4 - SECONDS, rel=1e-3)
    assert times.moved["all-gather", "fsdp"].waited == pytest.approx(SECONDS)
    second = between_slices("y", "1,2")
    both = times_of(PIECE, *first[:3], *second[:3], *first[3:], *second[3:], slices=slices)
    assert both.waited == pytest.approx(2 * seconds)


def test_a_text_of_several_slices_is_for_no_other_number(tmp_path, capsys):
    """The text is one slice's: its number of partitions does not tell."""
    body = "\n".join(f"  {line}" for line in (PIECE, *between_slices("x", "1,2")))
    (tmp_path / "text").write_text(
        f"HloModule m, num_partitions=4\n\nENTRY %main (a: f32[1]) -> f32[1] {{\n{body}\n}}\n"
    )
    given = ["plan", f"--hlo={tmp_path / 'text'}", "--topology=v5e:2x2"]
    assert cli.main([*given, "--slices=2", "--mesh=data=2,fsdp=4"]) == 0
    assert "all-reduce  data" in capsys.readouterr().out
    for others in (["--mesh=fsdp=4"], ["--slices=3", "--mesh=data=3,fsdp=4"]):
        assert cli.main([*given, *others]) == 2
        assert "the program is for 8 devices" in capsys.readouterr().err


def test_one_without_a_done_is_waited_for_at_once():
    whole = f"%g = f32[4000000]{{0}} all-gather(%a), channel_id=1, {GATHER}"
    times = times_of(PIECE, whole, work("w", SECONDS))
    assert times.waited == pytest.approx(SECONDS)
    reduced = "%r = f32[1000000]{0} all-reduce(%a), channel_id=1, replica_groups={}, to_apply=%add"
    assert times_of(PIECE, reduced).waited == pytest.approx(SECONDS / 2)  # a quarter of the bytes, twice


def test_two_over_the_same_links_follow_one_another():
    second = START.replace("%s", "%s2").replace("channel_id=1", "channel_id=2")
    done = DONE.replace("%d", "%d2").replace("%s", "%s2")
    assert times_of(PIECE, START, second, DONE, done).waited == pytest.approx(2 * SECONDS)


def test_a_group_of_one_device_moves_nothing():
    alone = START.replace("[1,4]<=[4]", "[4,1]<=[4]")
    times = times_of(PIECE, alone, DONE)
    assert times.moved == {} and times.waited == 0


def test_what_spreads_over_fusions_is_one_collective():
    """TPU v5e: a fusion starts it, one goes on with it beside its product, one ends it."""

    def carrying(name: str, marker: str) -> str:
        call = f'\n  ROOT %c = f32[1]{{0}} custom-call(%g), custom_call_target="{marker}"' if marker else ""
        given = f'%g = f32[4000000]{{0}} all-gather(%p), {GATHER}, frontend_attributes={{chain_id="7"}}'
        return f"%{name} (p: f32[1000000]) -> f32[1] {{\n  %p = f32[1000000]{{0}} parameter(0)\n  {given}{call}\n}}\n\n"

    parts = carrying("first", "AsyncCollectiveStart") + carrying("middle", "") + carrying("last", "AsyncCollectiveDone")
    cycles = round(SECONDS / 2 * 1.5e9)
    busy = f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    lines = [
        PIECE,
        "%f = f32[1]{0} fusion(%a), kind=kCustom, calls=%first",
        f"%m = f32[1]{{0}} fusion(%f), kind=kCustom, calls=%middle, {busy}",
        "%l = f32[1]{0} fusion(%m), kind=kCustom, calls=%last",
    ]
    times = times_of(*lines, computations=parts)
    ((key, moved),) = times.moved.items()
    assert key == ("all-gather", "fsdp") and moved.count == 1
    assert times.waited == pytest.approx(SECONDS / 2, rel=1e-3)


def test_loops_count_as_often_as_they_turn_and_branches_as_the_longer():
    loop = """%body (p: (s32[], f32[1])) -> (s32[], f32[1]) {
  %p = (s32[], f32[1]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[1]{0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %y = f32[1]{0} negate(%x), backend_config={"estimated_cycles":"1500000000"}
  ROOT %t = (s32[], f32[1]{0}) tuple(%j, %y)
}

%condition (c: (s32[], f32[1])) -> pred[] {
  %n = s32[] constant(3)
  %c = (s32[], f32[1]{0}) parameter(0)
  %k = s32[] get-tuple-element(%c), index=0
  ROOT %l = pred[] compare(%k, %n), direction=LT
}

%short (s: f32[1]) -> f32[1] {
  ROOT %s = f32[1]{0} parameter(0)
}

%long (o: f32[1]) -> f32[1] {
  %o = f32[1]{0} parameter(0)
  ROOT %q = f32[1]{0} negate(%o), backend_config={"estimated_cycles":"3000000000"}
}

"""
    lines = [
        "%a = f32[1]{0} parameter(0)",
        "%z = s32[] constant(0)",
        "%t0 = (s32[], f32[1]{0}) tuple(%z, %a)",
        "%w = (s32[], f32[1]{0}) while(%t0), condition=%condition, body=%body",
        "%good = pred[] constant(true)",
        "%c0 = f32[1]{0} conditional(%good, %a, %a), true_computation=%long, false_computation=%short",
    ]
    times = times_of(*lines, computations=loop)
    assert times.memory == pytest.approx(3 * 1.0 + 2.0)
    assert times.cycles == 3 * 1_500_000_000 + 3_000_000_000


def test_kernels_go_by_their_flops_or_their_bytes():
    query = "bf16[1,1,2048,128]{3,2,1,0}"
    lines = [f"%o{i} = {query} parameter({i})" for i in range(3)]
    attend = f'%splash_mha_fwd.1 = {query} custom-call(%o0, %o1, %o2), custom_call_target="tpu_custom_call"'
    times = times_of(*lines, attend)
    flops = 2 * 2.0 * 2048**2 * 128 * 0.5 * (1 + 1 / 4)
    assert times.kernel == pytest.approx(flops / (0.5 * 197e12)) and times.flops == flops
    mine = f'%mine.1 = {query} custom-call(%o0), custom_call_target="tpu_custom_call"'
    unknown = times_of(*lines, mine)
    assert unknown.kernel == pytest.approx(2 * 2048 * 128 * 2 / 819e9) and unknown.unknown == {"mine": 1}
    note = f'%n = {query} custom-call(%o0), custom_call_target="AllocateBuffer"'
    assert times_of(*lines, note).total == 0


def test_a_card_takes_the_larger_of_flops_and_bytes():
    dot = "%c = bf16[4096,4096]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    given = ["%a = bf16[4096,4096]{1,0} parameter(0)", "%b = bf16[4096,4096]{1,0} parameter(1)"]
    times = times_of(*given, dot, machine="h100:1x4")
    assert times.matrix == pytest.approx(2 * 4096**3 / 989e12)
    plain = times_of(*given, "%c = bf16[4096,4096]{1,0} add(%a, %b)", machine="h100:1x4")
    assert plain.memory == pytest.approx(3 * 4096**2 * 2 / 3350e9)
