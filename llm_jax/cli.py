"""The `llm-jax` command: reads the command line, runs what it asks for, says how that ended."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from llm_jax import errors
from llm_jax.arguments import make_parser
from llm_jax.config.values import did_you_mean
from llm_jax.errors import Preempted, UserError

OUTCOMES = tuple(item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception))


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


if __name__ == "__main__":
    sys.exit(main())
