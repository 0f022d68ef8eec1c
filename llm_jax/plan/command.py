"""What `llm-jax plan` does with its arguments."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llm_jax.config import Config, load, to_dict
from llm_jax.errors import UserError
from llm_jax.plan import fit, hlo, report
from llm_jax.plan.candidates import best, differing
from llm_jax.plan.compile import Compiled, compile_setting
from llm_jax.plan.cost import step_times
from llm_jax.plan.estimate import Estimate, estimate_compiled
from llm_jax.plan.hardware import Topology
from llm_jax.plan.memory import program_memory
from llm_jax.plan.network import placed, slices_of
from llm_jax.plan.quick import quick_estimate
from llm_jax.plan.search import try_all
from llm_jax.plan.setting import Setting, make_setting


def plan(setting: Setting, *, price: float, tokens: float, dump: str = "", save: str = "") -> str:
    """Compile, and say all that is known; where the step does not fit, what would make it fit."""
    compiled = compiled_with_progress(setting, save)
    if dump and compiled.text:
        Path(dump).write_text(compiled.text, encoding="utf-8")
    found = None if compiled.refused else estimate_compiled(setting, compiled)
    parts = [report.page(found, price=price, tokens=tokens)] if found else []
    if found is None or not found.fits:
        needed = fit.needed_bytes(setting, compiled, found)
        tensors = fit.large_tensors(setting)
        parts.append(report.misfit(setting, needed, tensors, fit.verified(setting)))
    return "\n\n".join(parts)


def quick(setting: Setting, *, price: float, tokens: float) -> str:
    refuse_generator(setting.cfg, "--quick")
    return report.page(quick_estimate(setting), price=price, tokens=tokens)


def refuse_generator(cfg: Config, flag: str) -> None:
    if divisor := getattr(cfg.model, "generator_divisor", 0):
        raise UserError(f"{flag} estimates no generator (model.generator_divisor = {divisor}): leave the flag out, and "
                        "the whole step is compiled")  # fmt: skip


def search(cfg: Config, machine: Topology, *, count: int, tokens: float, price: float, write: str) -> str:
    """Try the most promising settings; say how they rank, and the best one's page."""
    refuse_generator(cfg, "--search")
    chosen = best(cfg, machine, count)
    if not chosen:
        raise UserError(
            f"{cfg.name} fits on {machine} in no way that is tried (mesh, remat, accumulation): take a larger machine, "
            "shorter rows (data.sequence_length) or fewer rows (train.global_batch_size)"
        )
    tried = try_all(chosen)
    first = tried[0]
    if first.found is None or not first.found.fits:
        raise UserError(f"none of the {len(tried)} candidates fits once compiled; try more of them with --candidates")
    changes = differing(cfg, first.candidate.changes)
    if write:
        Path(write).write_text(json.dumps(to_dict(first.found.setting.cfg), indent=2) + "\n", encoding="utf-8")
    return "\n\n".join(
        [report.ranking(cfg, tried), report.page(first.found, price=price, tokens=tokens),
         "the best, as overrides:\n" + report.override_lines(changes)]
    )  # fmt: skip


def estimate(setting: Setting) -> Estimate:
    compiled = compiled_with_progress(setting)
    if compiled.refused:
        raise UserError(f"{setting.cfg.name} does not fit on {setting.machine}: {compiled.refused}")
    return estimate_compiled(setting, compiled)


def compare(specs: Sequence[str], overrides: Sequence[str], machine: Topology, *, price: float, tokens: float) -> str:
    first, second = (estimate(make_setting(load(spec, overrides), machine)) for spec in specs)
    return report.comparison(first, second, price=price, tokens=tokens)


def read_program(file: str, machine: Topology, mesh: dict[str, int]) -> str:
    """Time a compiled text from elsewhere."""
    try:
        program = hlo.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"--hlo={file}: this is not the text of a compiled program ({error})") from None
    devices = program.partitions * slices_of(program)
    if devices != machine.devices:
        raise UserError(f"--hlo={file}: the program is for {devices} devices, and {machine} has {machine.devices}")
    times = step_times(program, placed(machine, mesh or {"devices": machine.devices}))
    return report.program_page(file, machine, times, program_memory(program))


def compiled_with_progress(setting: Setting, save: str = "") -> Compiled:
    with waiting(f"compiling {setting.cfg.name} for {setting.machine}") as tell:
        return compile_setting(setting, save=save, waiting=tell)


@contextlib.contextmanager
def waiting(title: str) -> Iterator[Callable[[float], None]]:
    """Yields tell(seconds): a moving line on a terminal, one plain line elsewhere."""
    if not sys.stderr.isatty():
        told = []

        def tell(seconds: float) -> None:
            if not told:
                told.append(print(f"{title} (minutes, for a large machine)", file=sys.stderr, flush=True))

        yield tell
        return
    from rich.console import Console

    with Console(stderr=True).status(title) as status:
        yield lambda seconds: status.update(f"{title}: {seconds:.0f} s")
