"""The `llm-jax` command: reads the command line and the config, then hands over to the module that does the work.

Nothing heavy is imported until a command needs it: `llm-jax --help` and the refusal of a flag or a key answer at once.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from llm_jax import __version__, errors
from llm_jax.config import Config, check, config_names, from_dict, given, load, to_dict
from llm_jax.config.checks import check_data
from llm_jax.config.values import did_you_mean
from llm_jax.errors import Preempted, UserError

OUTCOMES = tuple(item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception))

OVERRIDES_HELP = """\
Any key of the config can be changed with --config.KEY=VALUE, for example
  llm-jax train --config=quickstart --config.optim.learning_rate=3e-4 --config.train.steps=1e3
--print_config shows them all. Configs that come with the package: """


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            names = re.findall(r"[\w-]+", choice[2])
            close = did_you_mean(choice[1], names, f"the commands are {', '.join(names)}")
            raise UserError(f"{self.prog} has no command {choice[1]}; {close}")
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 unexpected, 2 user's mistake, others in errors.py."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        code = run([argument for argument in argv if argument != "--debug"])
        sys.stdout.flush()  # here, where a closed pipe is still handled
        return code
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("\ninterrupted; finished checkpoints are kept, the same command goes on from the last", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(*describe_error(error, debug), sep="\n", file=sys.stderr)
        code = error.exit_code if isinstance(error, OUTCOMES) else 1
        if not isinstance(error, Preempted):  # on that all processes have agreed
            leave_the_others(code)
        return code


def leave_the_others(code: int) -> None:
    """End at once if this is one process of several: they must not wait for it."""
    if distributed := sys.modules.get("llm_jax.distributed"):
        distributed.leave(code)


def describe_error(error: Exception, debug: bool) -> list[str]:
    if isinstance(error, UserError):
        return [f"error: {error}"]
    if isinstance(error, OUTCOMES):
        return [str(error)]
    line = f"error: {type(error).__name__}: {' '.join(str(error).split())}"
    return [line] if debug else [line, "run again with --debug for the traceback"]


def run(argv: list[str]) -> int:
    parser = make_parser()
    argv, overrides = take_overrides(argv)
    if not argv:
        parser.print_help()
        return 2
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise unknown_argument(args.parser, unknown[0])
    args.overrides = overrides
    if overrides and not args.takes_overrides:
        raise UserError(f"--config.{overrides[0]}: {args.parser.prog} changes no config; see {args.parser.prog} --help")
    return args.command(args)


def take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without --config.KEY=VALUE and --config.KEY VALUE, and those as ["KEY=VALUE", ...], in order."""
    rest, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        override = argument.removeprefix("--config.")
        if "=" not in override:
            value = next(arguments, "--")
            if value.startswith("--"):
                raise UserError(f"{argument} has no value; write {argument}=VALUE")
            override = f"{override}={value}"
        overrides.append(override)
    return rest, overrides


def unknown_argument(parser: argparse.ArgumentParser, argument: str) -> UserError:
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    name = argument.partition("=")[0]
    close = did_you_mean(name, flags, f"see {parser.prog} --help")
    return UserError(f"{argument}: {parser.prog} has no such argument; {close}")


# ----------------------------------------------------------------------------------------------- the parsers


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="llm-jax", description="Train, evaluate and sample large language models in JAX.",
                    allow_abbrev=False)  # fmt: skip
    parser.add_argument("--version", action="version", version=f"llm-jax {__version__}")
    commands = Commands(parser)
    train = commands.add("train", train_command, "train a model, or go on with a run that was stopped", config=True)
    train.add_argument("--workdir", metavar="FOLDER", help="the run's folder (default: runs/NAME of the config)")
    train.add_argument("--executable", default="", metavar="FILE",
                       help="the compiled step that plan --save_executable wrote for these devices")  # fmt: skip
    only = train.add_mutually_exclusive_group()
    only.add_argument("--dry_run", action="store_true",
                      help="print what would run (config, parameters, mesh, memory, FLOPs) and stop")  # fmt: skip
    only.add_argument("--print_sharding", action="store_true",
                      help="print how the mesh splits every parameter, and stop")  # fmt: skip

    text = "measure a run's checkpoint on its validation data"
    evaluate = commands.add("evaluate", evaluate_command, text, overrides=True)
    evaluate.add_argument("--workdir", metavar="FOLDER", required=True, help="the run's folder")
    evaluate.add_argument("--step", type=int, metavar="N", help="checkpoint to take (default: the latest)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_generate(commands)
    add_predict(commands)
    export = commands.add("export", export_command, "write a run's model as safetensors")
    export.add_argument("--workdir", metavar="FOLDER", required=True, help="the run's folder")
    export.add_argument("--to", metavar="FOLDER", required=True, help="the new folder to write")
    export.add_argument("--step", type=int, metavar="N", help="checkpoint to take (default: the latest)")

    add_convert(commands)
    add_plan(commands)
    data = Commands(commands.add("data", None, "prepare or look at training data"))
    data.add("prepare", prepare_command, "tokenize a config's data into the cache, as train would", config=True)
    inspect = data.add("inspect", inspect_command, "show rows of a config's batches, as trained on", config=True)
    inspect.add_argument("--rows", type=int, default=2, metavar="N", help="how many rows (default: 2)")
    commands.add("doctor", doctor_command, "say whether this machine is ready, and what is missing")
    return parser


def add_predict(commands: "Commands") -> None:
    predict = commands.add("predict", predict_command, "write the labels and scores of new records", overrides=True)
    predict.add_argument("--workdir", metavar="FOLDER", required=True, help="the run's folder")
    predict.add_argument("--input", metavar="FILE", required=True,
                         help="jsonl, csv, tsv or parquet with the run's columns; no labels needed")  # fmt: skip
    predict.add_argument("--output", metavar="FILE", default="-", help="one JSON object a record (default: the output)")
    predict.add_argument("--batch_size", type=int, default=0, metavar="N", help="records (default: as in evaluation)")
    predict.add_argument("--step", type=int, metavar="N", help="checkpoint to take (default: the run's latest or best)")
    predict.add_argument("--embeddings", action="store_true",
                         help="of a similarity run: the vector of each record's text, of length 1")  # fmt: skip


def add_generate(commands: "Commands") -> None:
    generate = commands.add("generate", generate_command, "sample text from a run's checkpoint")
    generate.add_argument("--workdir", metavar="FOLDER", required=True, help="the run's folder")
    generate.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    generate.add_argument("--prompt_file", metavar="FILE", help="a file with one more prompt; - is the input")
    for flag, kind in (("max_tokens", int), ("temperature", float), ("top_k", int), ("top_p", float), ("min_p", float)):
        generate.add_argument(f"--{flag}", type=kind, metavar="N", help=f"as generate.{flag} of the config")
    generate.add_argument("--step", type=int, metavar="N", help="checkpoint to take (default: the latest)")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    generate.add_argument("--num_samples", type=int, default=1, metavar="N", help="texts a prompt (default: 1)")


def add_convert(commands: "Commands") -> None:
    text = "turn a checkpoint of the Hugging Face hub into a run's folder, or a run into one"
    convert = commands.add("convert", convert_command, text, overrides=True)
    convert.epilog = (
        "One side is hf:PATH (or from the hub hf:OWNER/NAME), the other a run's folder:\n"
        "  llm-jax convert --from=hf:meta-llama/Llama-3.1-8B --to=runs/llama --config.mesh.fsdp=-1\n"
        "  llm-jax convert --from=runs/llama --to=hf:exported\n"
        "It ends by comparing logits with the source's; exit code 6: there was nothing to compare with."
    )
    convert.add_argument("--from", dest="source", metavar="WHAT", help="hf:PATH_OR_NAME, or a run's folder")
    convert.add_argument("--to", metavar="WHERE", help="the new run's folder, or hf:PATH of a new folder")
    convert.add_argument("--dtype", metavar="NAME", choices=("float32", "bfloat16", "float16", "float64"),
                         help="of the tensors written (default: as they are in the source)")  # fmt: skip
    convert.add_argument("--revision", metavar="REV", help="branch, tag or commit of --from's name on the hub; "
                         "NAME@REV says it too, and for an adapter")  # fmt: skip
    convert.add_argument("--step", type=int, metavar="N", help="checkpoint of a run to take (default: the latest)")
    convert.add_argument("--architecture", metavar="NAME", help="to hf: of --list (default: the source's, or the first "
                         "that can say the model)")  # fmt: skip
    convert.add_argument("--shard_gb", type=float, default=5.0, metavar="N", help="to hf: largest file (default: 5 GB)")
    convert.add_argument("--adapter", nargs="?", const=True, metavar="PATH_OR_NAME",
                         help="from hf: an adapter (peft) taken along; to hf: the run's adapters alone")  # fmt: skip
    convert.add_argument("--merge", action="store_true", help="from hf: add the adapter to the weights that it changes")
    convert.add_argument("--check", choices=("auto", "whole", "streamed"), default="auto", help="how logits are "
                         "compared; streamed: one layer at a time (default: where memory is short)")  # fmt: skip
    convert.add_argument("--no_check", action="store_true", help="do not compare logits; ends with exit code 6")
    convert.add_argument("--dry_run", action="store_true", help="from hf: list what becomes what, and stop")
    convert.add_argument("--list", action="store_true", help="list the architectures that can be converted, and stop")


def add_plan(commands: "Commands") -> None:
    text = "say what a run needs, takes and costs on a machine that is not there"
    plan = commands.add("plan", plan_command, text, config=True)
    plan.add_argument("--topology", metavar="NAME:SIZES", help="the machine: v5p:8x8x8, v5e:16x16, h100:16x8")
    plan.add_argument("--slices", type=int, default=1, metavar="N", help="TPU slices of that size (default: 1)")
    plan.add_argument("--price", type=float, default=0.0, metavar="N", help="of a chip-hour, in any currency")
    plan.add_argument("--tokens", type=float, default=0.0, metavar="N", help="of the run (default: the config's)")
    plan.add_argument("--dump_hlo", default="", metavar="FILE", help="write the compiled text")
    plan.add_argument("--save_executable", default="", metavar="FILE",
                      help="write the compiled step, for train on that machine")  # fmt: skip
    other = plan.add_mutually_exclusive_group()
    other.add_argument("--hlo", metavar="FILE", help="time a compiled text from elsewhere, in place of a config")
    other.add_argument("--compare", nargs=2, metavar="SPEC", help="two configs side by side")
    other.add_argument("--quick", action="store_true", help="estimate without compiling, in two seconds")
    other.add_argument("--search", action="store_true", help="try meshes, remat and micro-batches; rank the best")
    plan.add_argument("--candidates", type=int, default=4, metavar="N", help="of a search, to compile (default: 4)")
    plan.add_argument("--write_config", default="", metavar="FILE", help="of a search: write the best as a config")
    plan.add_argument("--mesh", default="", metavar="AXIS=N,...", help="of --hlo: its mesh's axes, in order")


class Commands:
    """The sub-commands of a parser."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.choices = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def add(self, name: str, command: Any, text: str, *, config: bool = False, overrides: bool = False) -> Parser:
        """A sub-command; `config`: it reads --config, `overrides`: it takes --config.KEY=VALUE alone."""
        formatter = argparse.RawDescriptionHelpFormatter
        parser = self.choices.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                         formatter_class=formatter, allow_abbrev=False)  # fmt: skip
        parser.set_defaults(parser=parser, command=command, takes_overrides=config or overrides)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if config:
            parser.epilog = OVERRIDES_HELP + ", ".join(config_names())
            parser.add_argument("--config", metavar="SPEC", help="a config file, or the name of a shipped config")
            parser.add_argument("--print_config", action="store_true", help="print every key as JSON and stop")
        return parser


# ---------------------------------------------------------------------------------------------- the commands


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
        print(train.describe(cfg))
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
    if args.shard_gb <= 0:
        raise UserError(f"--shard_gb={args.shard_gb:g}: give a size above 0")


def plan_command(args: argparse.Namespace) -> int:
    if args.print_config:
        return print_json(to_dict(read_config(args)))
    if not args.topology:
        raise UserError("plan needs --topology=NAME:SIZES, for example v5p:4x4x4, v5e:16x16 or h100:16x8")
    for name in ("price", "tokens"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name}={getattr(args, name):g}: give a number above 0")
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


if __name__ == "__main__":
    sys.exit(main())
