"""What each command of `llm-jax` does with its arguments, before it hands over to the module that does the work.

Nothing heavy is imported until a command needs it: the refusal of a flag or a key answers at once.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import tempfile
from typing import Any

from llm_jax.config import Config, check, config_names, from_dict, given, load, to_dict
from llm_jax.config.checks import check_data
from llm_jax.config.values import did_you_mean
from llm_jax.errors import UserError


def train_command(args: argparse.Namespace) -> int:
    cfg = with_pretrained(read_config(args), args)
    if args.print_config:
        return print_json(to_dict(cfg))
    check(cfg)
    workdir = absolute_folder(args.workdir or os.path.join("runs", cfg.name))
    if not (args.dry_run or args.print_sharding):
        make_writable(workdir)
        print(f"run folder: {workdir}", flush=True)
    start(cfg)
    from llm_jax.training import train

    if args.print_sharding:
        print(train.sharding_table(cfg))
    elif args.dry_run:
        print(train.describe(cfg, workdir))
    else:
        train.train(cfg, workdir, args.executable)
    return 0


def evaluate_command(args: argparse.Namespace) -> int:
    workdir = existing_run(args.workdir)
    start()
    from llm_jax.training import restore

    results = restore.evaluate(workdir, step=args.step, overrides=args.overrides)
    if args.json:
        return print_json(results)
    width = max(map(len, results), default=0)
    for name, value in results.items():
        print(f"{name:<{width}}  {f'{value:.6g}' if isinstance(value, float) else value}")
    return 0


def predict_command(args: argparse.Namespace) -> int:
    if args.batch_size < 0:
        raise UserError(f"--batch_size={args.batch_size}: give at least 1")
    workdir = existing_run(args.workdir)
    start()
    from llm_jax.training import predict

    options = dict(step=args.step, overrides=args.overrides, batch_size=args.batch_size, embeddings=args.embeddings)
    count = predict.predict(workdir, args.input, args.output, **options)
    if args.output != "-":
        print(f"{count:,} predictions are in {args.output}")
    return 0


def generate_command(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "stop")}
    given = {name: value for name, value in given.items() if value is not None}
    checked = from_dict({"generate": given}).generate  # what is out of range is refused before a model is loaded
    given = {name: getattr(checked, name) for name in given}
    if args.num_samples < 1:
        raise UserError(f"--num_samples={args.num_samples}: give at least 1")
    workdir = existing_run(args.workdir)
    prompts = args.prompt + ([read_text(args.prompt_file)] if args.prompt_file else []) or [""]
    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    start()
    from llm_jax.training import restore

    restore.generate(workdir, prompts, given, args.seed, stream=len(prompts) == 1, step=args.step)
    return 0


def export_command(args: argparse.Namespace) -> int:
    workdir, folder = existing_run(args.workdir), absolute_folder(args.to)
    start()
    from llm_jax.training import restore

    print(restore.export(workdir, folder, args.step))
    return 0


def convert_command(args: argparse.Namespace) -> int:
    if not args.list:
        check_sides(args)
    from llm_jax.training import convert, mapping

    if args.list:
        print(mapping.support_table())
        return 0
    source, to = args.source.removeprefix("hf:"), args.to and absolute_folder(args.to.removeprefix("hf:"))
    options: dict[str, Any] = dict(dtype=args.dtype)
    check = dict(check=not args.no_check, streamed={"auto": None, "whole": False, "streamed": True}[args.check])
    if args.source.startswith("hf:"):
        options |= dict(overrides=args.overrides, revision=args.revision)
        if args.dry_run:
            print(mapping.mapping(source, **options))
        else:
            adapter = args.adapter and args.adapter.removeprefix("hf:")
            convert.from_hub(source, to, adapter=adapter, merge=args.merge, **check, **options)
        return 0
    workdir = existing_run(source, "--from")
    start()
    options |= dict(step=args.step, architecture=args.architecture, shard_bytes=int(args.shard_gb * 1e9))
    convert.to_hub(workdir, to, adapter=bool(args.adapter), **check, **options)
    return 0


def check_sides(args: argparse.Namespace) -> None:
    """One side is of the hub, the other a run; and each flag belongs to the way that is taken."""
    if not args.source or not (args.to or args.dry_run):
        raise UserError("convert needs --from and --to, one of them hf:PATH and the other a run's folder")
    into_run = args.source.startswith("hf:")
    if "hf:" in (args.source, args.to):
        raise UserError("hf: alone names nothing; write hf:PATH, or hf:OWNER/NAME of the hub")
    if args.to and into_run == args.to.startswith("hf:"):
        raise UserError(
            f"--from={args.source} --to={args.to}: exactly one of the two begins with hf:, the other is a run's folder"
        )
    if args.to and is_remote(args.to.removeprefix("hf:")):
        raise UserError(f"--to={args.to}: give a path; mount remote storage first")
    one_way = {
        True: dict(step=args.step, architecture=args.architecture),
        False: dict(revision=args.revision, dry_run=args.dry_run, config=args.overrides, merge=args.merge),
    }
    for name, value in one_way[into_run].items():
        if value:
            way = "from a run to hf:" if into_run else "from hf: to a run"
            raise UserError(f"--{name} is for converting {way}, and this goes the other way; leave it out")
    if into_run and (args.adapter is True or args.merge and not args.adapter):
        raise UserError("--adapter=PATH: say which adapter is to be taken along")
    if not into_run and isinstance(args.adapter, str):
        raise UserError(f"--adapter={args.adapter}: on the way to hf: it is the run's own; give --adapter alone")
    if not 0 < args.shard_gb < math.inf:
        raise UserError(f"--shard_gb={args.shard_gb:g}: give a size above 0")


def plan_command(args: argparse.Namespace) -> int:
    if args.print_config:
        return print_json(to_dict(read_config(args)))
    if not args.topology:
        raise UserError("plan needs --topology=NAME:SIZES, for example v5p:4x4x4, v5e:16x16 or h100:16x8")
    for name in ("price", "tokens"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name}={getattr(args, name):g}: give a number above 0")
    check_plan_flags(args)
    if args.candidates < 1:
        raise UserError(f"--candidates={args.candidates}: give at least 1")
    os.environ["JAX_PLATFORMS"] = "cpu"  # the machine planned for is another one
    start()
    from llm_jax.plan import command
    from llm_jax.plan.hardware import topology

    machine = topology(args.topology, args.slices)
    money = dict(price=args.price, tokens=args.tokens)
    if args.hlo:
        print(command.read_program(args.hlo, machine, mesh_of(args.mesh)))
    elif args.compare:
        print(command.compare(args.compare, args.overrides, machine, **money))
    else:
        print(plan_config(args, machine, read_config(args)))
    return 0


def check_plan_flags(args: argparse.Namespace) -> None:
    """Refuse flags that another form of plan alone reads."""
    whole = not (args.hlo or args.compare or args.quick or args.search)
    belongs = {
        "dump_hlo": (whole, "a plan that is compiled"), "save_executable": (whole, "a plan that is compiled"),
        "write_config": (args.search, "--search"), "mesh": (args.hlo, "--hlo"),
    }  # fmt: skip
    for name, (fits, what) in belongs.items():
        if getattr(args, name) and not fits:
            raise UserError(f"--{name}={getattr(args, name)}: it is for {what}; leave it out here")


def plan_config(args: argparse.Namespace, machine: Any, cfg: Config) -> str:
    from llm_jax.plan import command
    from llm_jax.plan.setting import make_setting

    tokens = args.tokens or cfg.train.tokens or cfg.train.steps * cfg.train.global_batch_size * cfg.data.sequence_length
    money = dict(price=args.price, tokens=tokens)
    if args.search:
        return command.search(cfg, machine, count=args.candidates, write=args.write_config, **money)
    setting = make_setting(cfg, machine)
    if args.quick:
        return command.quick(setting, **money)
    return command.plan(setting, dump=args.dump_hlo, save=args.save_executable, **money)


def mesh_of(text: str) -> dict[str, int]:
    """{"data": 2, "fsdp": 8} of "data=2,fsdp=8"."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if not all(axis and size.isdecimal() for axis, _, size in pairs):
        raise UserError(f"--mesh={text}: write it as AXIS=SIZE,AXIS=SIZE in the order of the program's mesh")
    return {axis: int(size) for axis, _, size in pairs}


def prepare_command(args: argparse.Namespace) -> int:
    cfg = read_config(args)
    if args.print_config:
        return print_json(to_dict(cfg))
    if cfg.data.task != "language":
        cfg = with_pretrained(cfg, args)
        check(cfg)
        from llm_jax.data import tasks

        stores = tasks.prepare(cfg.data)
        rows = tasks.make_stream(stores, cfg.data, cfg.seed).epoch_rows
        for side, counts in stores[0].manifest["splits"].items():
            told = ", ".join(f"{counts[name]:,} {name}" for name in ("records", "texts", "tokens") if name in counts)
            print(f"{side}: {told}" + (f" in {rows:,} rows an epoch" if side == "train" else ""))
        if names := getattr(stores[0], "names", ()):
            print(f"labels: {', '.join(names)}")
        return 0
    check_data(cfg)
    from llm_jax.data import mixture, store

    mixture.make_mixture(store.prepare(cfg.data), cfg.data, cfg.seed)  # makes the packing plans
    return 0


def inspect_command(args: argparse.Namespace) -> int:
    cfg = with_pretrained(read_config(args), args)
    if args.print_config:
        return print_json(to_dict(cfg))
    check_data(cfg)
    if args.rows < 1:
        raise UserError(f"--rows={args.rows}: give at least 1")
    start(cfg)
    import numpy as np

    from llm_jax.data import inspect, labelled, loader, tasks
    from llm_jax.sharding import Layout

    stores = tasks.prepare(cfg.data)
    with contextlib.closing(loader.make_train(stores, cfg.data, args.rows, cfg.seed, Layout())) as batches:
        features = {name: np.asarray(array) for name, array in next(batches).items()}
    texts = labelled.texts_a_record(cfg.data)  # of one record, in rows that lie args.rows apart
    numbers = [text * args.rows + record for record in range(args.rows) for text in range(texts)]
    names = getattr(stores[0], "names", ())
    rows = ({name: array[number] for name, array in features.items()} for number in numbers)
    told = (inspect.with_targets(row, cfg.data.task, names) for row in rows)
    inspect.inspect_rows(told, stores[0].tokenizer, len(numbers))
    return 0


def doctor_command(args: argparse.Namespace) -> int:
    from llm_jax import doctor

    return doctor.examine()


# ---------------------------------------------------------------------------------------------------- parts


def read_config(args: argparse.Namespace) -> Config:
    if not args.config:
        names = ", ".join(config_names())
        raise UserError(f"{args.parser.prog} needs --config=FILE or the name of a shipped config ({names})")
    return load(args.config, args.overrides)


def with_pretrained(cfg: Config, args: argparse.Namespace) -> Config:
    """`cfg` with the model and tokenizer of what it starts from, where it takes them over."""
    if not cfg.checkpoint.init_from.startswith("hf:") and (cfg.data.task == "language" or not cfg.checkpoint.init_from):
        return cfg
    from llm_jax.training import pretrained

    return pretrained.adopt(cfg, given(args.config, args.overrides))


def start(cfg: Config | None = None) -> None:
    from llm_jax.backend import start_backend

    start_backend(cfg)


def print_json(value: Any) -> int:
    print(json.dumps(value, indent=2))
    return 0


def read_text(file: str) -> str:
    try:
        if file == "-":
            return sys.stdin.read()
        with open(file, encoding="utf-8") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file={file}: cannot be read as UTF-8 text ({error})") from None


def is_remote(folder: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", folder) is not None


def absolute_folder(folder: str) -> str:
    """The folder from the root on, so that a later change of folder changes nothing; gs:// and its like stay."""
    return folder if is_remote(folder) else os.path.abspath(os.path.expanduser(folder))


def make_writable(workdir: str) -> None:
    """Make the run's folder, or refuse one that nothing can be written to, before anything is computed."""
    if is_remote(workdir):
        return
    try:
        os.makedirs(workdir, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        reason = "there is a file of this name" if os.path.isfile(workdir) else error.strerror
        raise UserError(f"--workdir={workdir}: no run can be written there ({reason}); give another folder") from None


def existing_run(folder: str, flag: str = "--workdir") -> str:
    workdir = absolute_folder(folder)
    if not is_remote(workdir) and not os.path.isdir(workdir):
        parent = os.path.dirname(workdir)
        names = sorted(os.listdir(parent)) if os.path.isdir(parent) else []
        close = did_you_mean(os.path.basename(workdir), names, "train makes one: llm-jax train --help")
        raise UserError(f"{flag}={folder}: there is no run folder {workdir}; {close}")
    return workdir
