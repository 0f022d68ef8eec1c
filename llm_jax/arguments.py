"""The command line of `llm-jax`: every command, its flags and what they say of themselves."""

import argparse
import re
from typing import Any, NoReturn

from llm_jax import __version__
from llm_jax.commands import (
    convert_command,
    doctor_command,
    evaluate_command,
    export_command,
    generate_command,
    inspect_command,
    plan_command,
    predict_command,
    prepare_command,
    train_command,
)
from llm_jax.config import config_names
from llm_jax.config.values import did_you_mean
from llm_jax.errors import UserError

OVERRIDES_HELP = """\
Any key of the config can be changed with --config.KEY=VALUE, for example
  llm-jax train --config=quickstart --config.optim.learning_rate=3e-4 --config.train.steps=1e3
--print_config shows them all. Configs that come with the package: """


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice and message.startswith("argument COMMAND"):
            names = re.findall(r"[\w-]+", choice[2])
            close = did_you_mean(choice[1], names, f"the commands are {', '.join(names)}")
            raise UserError(f"{self.prog} has no command {choice[1]}; {close}")
        raise UserError(f"{message}; see {self.prog} --help")


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
