"""The command line: flags and config, the other processes, then one mode.

Whatever the user can get wrong here ends in one line on stderr and exit code 2, before JAX loads.
"""

import contextlib
import difflib
import functools
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from cosup_jax import dependencies
from cosup_jax.errors import REFUSED, LostProcess, UserError, stopped_code

MODES = {  # mode M runs cosup_jax.M.M(config, workdir)
    "train": "train, evaluate and checkpoint; resume where the workdir left off (default)",
    "validate": "check config and data, every bad row with file, line and reason; compiles nothing",
    "prepare": "check and tokenise all sources into WORKDIR/prepared, for any run to read",
    "encode": "passages -> vectors -> WORKDIR/index; goes on where it left off",
    "mine": "training sources with the model's own hard negatives -> WORKDIR/mined",
    "generate": "cited answers to --questions=FILE.jsonl, or at a prompt",
    "evaluate": "held-out questions answered in several ways and scored, with intervals",
    "export": "the trained towers for transformers, vLLM and sentence-transformers, checked",
    "preflight": "compile the step for --topology=..., without data: its memory, FLOPs and time",
    "study": "train the arms of an experiment under several seeds, measure and compare them",
    "benchmark": "the speed of training, its data, encoding, searching and answering, and peaks",
}
KEPT = {  # by a mode that is told to stop, and gone on from by the same command
    "train": "the last checkpoint",
    "prepare": "the tokens of finished sources",
    "encode": "the finished shards",
    "mine": "the vectors of finished shards",
    "generate": "the answers written so far",
    "evaluate": "the answers written so far",
    "study": "finished runs and the last checkpoint",
}
OPTIONS = {  # flags of one mode: what they are called in its function, and int (0 or more) or str
    "validate": {"--show": ("show_rows", int), "--limit": ("limit", int)},
    "generate": {"--questions": ("questions", str), "--output": ("output", str)},
    "preflight": {"--topology": ("topology", str), "--steps": ("steps", int)},
    "benchmark": {
        "--steps": ("steps", int),
        "--batches": ("batches", int),
        "--passages": ("passages", int),
        "--vectors": ("vectors", int),
        "--width": ("width", int),
        "--answers": ("answers", int),
        "--curves": ("curves", str),
    },
}
JOINING = {  # flags that stand for variables of the environment
    "--coordinator": "JAX_COORDINATOR_ADDRESS",
    "--num_processes": "JAX_NUM_PROCESSES",
    "--process_id": "JAX_PROCESS_ID",
}
USAGE = """\
usage: python -m cosup_jax.main --config=FILE.py[:VARIANT] --workdir=DIR [--mode=MODE]
                                [--config.KEY=VALUE ...]

modes:
{modes}

--mode=validate also takes --show=N, training rows as the model reads them, and --limit=N, rows
named of each kind of finding; --mode=generate takes --questions=FILE and --output=FILE, both JSONL;
--mode=benchmark takes how many of each it measures, 0 for none: --steps trained, --batches read,
--passages encoded, --vectors of --width searched, --answers; and --curves=NAME,... or all;
--mode=preflight takes --topology=host or a TPU slice such as v5e:16x16, and on the host --steps=N,
steps on random data whose time is set beside the predicted one.

--config=DIR/config.json is the config of the run in DIR. Add --help to --config=... for every key
and its value there; cosup_jax/config.py gives the meanings. Several processes: the scripts in
launch/, or srun; else give each process --coordinator=HOST:PORT --num_processes=N --process_id=I,
or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""
_CONFIG_KEY = "--config."


def main(argv: Sequence[str]) -> int:
    """Runs one mode; returns the exit code. A fault of ours propagates."""
    flags = {}
    try:
        flags = parse_flags(argv)
        stopped = _run(flags) == "stopped"
        return stopped_code(0) if stopped else 0
    except (UserError, LostProcess, ModuleNotFoundError, OSError) as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        _tell_the_others(mistake, mistake.code, functools.partial(_print_error, mistake))
        return mistake.code
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        line = "" if getattr(error, "said", False) else _stopped(flags) + "\n"
        say = functools.partial(print, line, end="", file=sys.stderr, flush=True)
        _tell_the_others(error, LostProcess.code, say)
        trains = flags.get("--mode", "train") == "train"
        return stopped_code(0 if trains else 128 + number)


def _mistake(error: Exception) -> UserError | LostProcess | None:
    """What is told in one line; None of a fault of ours."""
    if isinstance(error, ModuleNotFoundError):
        return dependencies.missing(error)
    if isinstance(error, OSError):
        if error.errno not in REFUSED or error.filename is None:
            return None
        return UserError(f"{error.filename}: {error.strerror}; check the path and its permissions")
    return error


def _stopped(flags: Mapping[str, str]) -> str:
    """What is said where a mode is told to stop."""
    mode = flags.get("--mode", "train")
    if mode == "generate" and "--questions" not in flags:
        return "stopped"
    kept = KEPT.get(mode)
    return f"stopped; the same command {f'goes on from {kept}' if kept else 'starts anew'}"


def _run(flags: Mapping[str, str]) -> str | None:
    """What the mode returns: train, how it ended. What pip installs is imported here and below."""
    if "--help" in flags:
        print(_help(flags), end="")
        return None
    mode = flags.get("--mode", "train")
    if mode not in MODES:
        raise UserError(f"unknown --mode={mode}; modes: {', '.join(MODES)}")
    for needed in ("--config", "--workdir"):
        if not flags.get(needed):
            raise UserError(f"{needed}=... is missing; --help shows the usage")
    configs = importlib.import_module("cosup_jax.config_files")
    config = configs.frozen(flags["--config"], _overrides(flags))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", force=True)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not there
    if config.deterministic:
        flag = "--xla_gpu_deterministic_ops=true"  # before JAX reads it
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        print("deterministic: reproducible GPU kernels, slower scatters and reductions")
    options = _options(flags, mode)
    if mode == "study":  # its arms are variants of the file
        options["file"] = configs.File(flags["--config"], _overrides(flags))
    processes = importlib.import_module("cosup_jax.runtime.processes")  # from here on with JAX
    processes.join(os.environ | _told(flags))
    importlib.import_module("cosup_jax.runtime.compiling").keep_programs(os.environ)
    given = dict(configs.leaves(configs.to_dict(config)))
    processes.agree("how it was started", processes.facts(mode, flags["--workdir"], given))
    run = getattr(importlib.import_module(f"cosup_jax.{mode}"), mode)
    told = contextlib.nullcontext()  # train has notices of its own, and a loop
    if mode != "train":
        told = importlib.import_module("cosup_jax.runtime.notices").Notices(_stopped(flags))
    with told:
        state = run(config, flags["--workdir"], **options)
    processes.finish()
    return state


def parse_flags(argv: Sequence[str]) -> dict[str, str]:
    """`--name=value` or `--name value` -> {"--name": "value"}; of a repeated flag the last counts.

    Raises UserError for anything else, and for a name that is no flag.
    """
    flags, arguments = {}, iter(argv)
    own = (name for options in OPTIONS.values() for name in options)
    plain = ["--config", "--workdir", "--mode", *JOINING, *dict.fromkeys(own)]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("-h", "--help"):
            flags["--help"] = ""
            continue
        if name not in plain and not name.startswith(_CONFIG_KEY):
            start, dot, key = name.partition(".")
            near = difflib.get_close_matches(start, plain, n=1, cutoff=0.75)
            known = ", ".join([*plain, "--config.KEY", "--help"])
            hint = f"did you mean {near[0]}{dot}{key}?" if near else f"flags: {known}"
            raise UserError(f"unknown argument {argument!r}; {hint}")
        if not equals:
            value = next(arguments, "--")
            if value.startswith("--"):
                raise UserError(f"{name} has no value; write {name}=VALUE")
        flags[name] = value
    return flags


def _told(flags: Mapping[str, str]) -> dict[str, str]:
    """The flags that say which process this is, as the environment would."""
    return {variable: flags[name] for name, variable in JOINING.items() if name in flags}


def _options(flags: Mapping[str, str], mode: str) -> dict[str, int | str]:
    """The mode's own flags. Raises UserError for another mode's, and for a value of no use."""
    found, own = {}, OPTIONS.get(mode, {})
    for name in flags:
        if name.startswith(f"{_CONFIG_KEY}study.") and mode != "study":
            raise UserError(
                f"{name} means nothing with --mode={mode}; add --mode=study, or drop it"
            )
    for name in {name for options in OPTIONS.values() for name in options} & flags.keys():
        if name not in own:
            raise UserError(f"{name} means nothing with --mode={mode}; drop it")
        argument, kind = own[name]
        if kind is int and not flags[name].isdecimal():
            raise UserError(f"{name}={flags[name]} must be a whole number")
        if not flags[name]:
            raise UserError(f"{name} has no value; write {name}=VALUE")
        found[argument] = kind(flags[name])
    return found


def _overrides(flags: Mapping[str, str]) -> dict[str, str]:
    prefix = len(_CONFIG_KEY)
    return {name[prefix:]: text for name, text in flags.items() if name.startswith(_CONFIG_KEY)}


def _help(flags: Mapping[str, str]) -> str:
    text = USAGE.format(modes="\n".join(f"  {mode:10}{does}" for mode, does in MODES.items()))
    if flags.get("--config"):
        configs = importlib.import_module("cosup_jax.config_files")
        config = configs.resolve(flags["--config"], _overrides(flags))
        for key, value in configs.leaves(config.to_dict()):
            text += f"\n{_CONFIG_KEY}{key}={value}"
        text += "\n"
    return text


def _print_error(error: UserError | str) -> None:
    print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)


def _tell_the_others(error: BaseException, code: int, say: Callable[[], None]) -> None:
    """Says what went wrong, here and in the other processes, unless one of them is the cause."""
    liveness = sys.modules.get("cosup_jax.runtime.liveness")  # else there are none yet
    if liveness:
        liveness.await_news(error)
    say()
    if liveness:
        with contextlib.suppress(KeyboardInterrupt):  # it ends anyway, by its own code
            liveness.tell(f"{type(error).__name__}: {error}" if code == 1 else str(error), code)


def _together() -> bool:
    """Whether this process has joined others."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _run_and_exit() -> None:
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _together():
            # Whoever read what we print has closed it, as `| head` does.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        code = 1
        _tell_the_others(error, code, traceback.print_exc)
    if _together():
        # Not finished together: a normal exit would wait in JAX's shutdown barrier for the others.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _run_and_exit()
