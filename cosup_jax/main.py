"""The command line: flags and config, the other processes, then one mode.

Whatever the user can get wrong here ends in one line on stderr and exit code 2, before JAX loads.
"""

import difflib
import functools
import importlib
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from cosup_jax.config import Config, set_dotted, to_dict
from cosup_jax.errors import LostProcess, UserError
from cosup_jax.freeze import freeze

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
    "benchmark": "the speed of tokenising, reading, searching and answering on this machine",
}
OPTIONS = {  # flags of one mode: what they are called in its function, and int (0 or more) or str
    "validate": {"--show": ("show_rows", int), "--limit": ("limit", int)},
    "generate": {"--questions": ("questions", str), "--output": ("output", str)},
    "preflight": {"--topology": ("topology", str), "--steps": ("steps", int)},
    "benchmark": {
        "--steps": ("steps", int),
        "--vectors": ("vectors", int),
        "--width": ("width", int),
        "--answers": ("answers", int),
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
--mode=benchmark takes --steps=N, batches that are read, --vectors=N of --width=D, vectors that are
searched, and --answers=N, questions that are answered; --mode=preflight takes --topology=host or a
TPU slice such as v5e:16x16, and on the host --steps=N, steps on random data whose time is set
beside the predicted one.

Add --help to --config=FILE.py[:VARIANT] for every key and its value there; cosup_jax/config.py
gives the meanings. Several processes: the scripts in launch/, or srun; else give each process
--coordinator=HOST:PORT --num_processes=N --process_id=I, or set JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""
_CONFIG_KEY = "--config."


def main(argv: Sequence[str]) -> int:
    """Runs one mode; returns the exit code, 0 or 2. A fault of ours propagates."""
    try:
        flags = parse_flags(argv)
        if "--help" in flags:
            print(_help(flags), end="")
            return 0
        mode = flags.get("--mode", "train")
        if mode not in MODES:
            raise UserError(f"unknown --mode={mode}; modes: {', '.join(MODES)}")
        for needed in ("--config", "--workdir"):
            if not flags.get(needed):
                raise UserError(f"{needed}=... is missing; --help shows the usage")
        explicit = frozenset(_overrides(flags))
        config = freeze(resolve_config(flags), explicit)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", force=True)
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not there
        if config.deterministic:
            flag = "--xla_gpu_deterministic_ops=true"  # before JAX reads it
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
            print("deterministic: reproducible GPU kernels, slower scatters and reductions")
        options = _options(flags, mode)
        processes = importlib.import_module("cosup_jax.runtime.processes")  # from here on with JAX
        processes.join(os.environ | _told(flags))
        given = dict(_leaves(to_dict(config)))
        processes.agree("how it was started", processes.facts(mode, flags["--workdir"], given))
        run = getattr(importlib.import_module(f"cosup_jax.{mode}"), mode)
        state = run(config, flags["--workdir"], **options)
        processes.finish()
    except (UserError, LostProcess) as error:
        _tell_the_others(error, error.code, functools.partial(_print_error, error))
        return error.code
    except KeyboardInterrupt as error:
        stopped = "stopped; the same command goes on from the last checkpoint"
        _tell_the_others(error, LostProcess.code, functools.partial(print, stopped, flush=True))
        state = "stopped"
    return int(os.environ.get("COSUP_STOPPED_CODE", "0")) if state == "stopped" else 0


def parse_flags(argv: Sequence[str]) -> dict[str, str]:
    """`--name=value` or `--name value` -> {"--name": "value"}; of a repeated flag the last counts.

    Raises UserError for anything else, and for a name that is no flag.
    """
    flags = {}
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("-h", "--help"):
            flags["--help"] = ""
            continue
        plain = [
            "--config",
            "--workdir",
            "--mode",
            *JOINING,
            *(o for mode in OPTIONS.values() for o in mode),
        ]
        if name not in plain and not name.startswith(_CONFIG_KEY):
            known = ", ".join([*plain, "--config.KEY", "--help"])
            raise UserError(f"unknown argument {argument!r}; flags: {known}")
        if not equals:
            value = next(arguments, "--")
            if value.startswith("--"):
                raise UserError(f"{name} has no value; write {name}=VALUE")
        flags[name] = value
    return flags


def resolve_config(flags: Mapping[str, str]) -> ml_collections.ConfigDict:
    """Loads the --config file and applies the --config.KEY overrides. Raises UserError."""
    config = load_config(flags["--config"])
    defaults = dict(_leaves(to_dict(Config())))
    for key, text in _overrides(flags).items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            near = near or [name for name in defaults if name.startswith(f"{key}.")]
            hint = f"did you mean {near[0]!r}?" if near else "cosup_jax/config.py lists them all"
            raise UserError(f"unknown config key {key!r}; {hint}")
        set_dotted(config, key, _parse(key, text, type(defaults[key])))
    return config


def load_config(path_and_variant: str) -> ml_collections.ConfigDict:
    """`FILE.py[:VARIANT]` -> what its `get_config(VARIANT)` returns.

    Raises UserError, naming file and line, for whatever goes wrong inside the file too.
    """
    path, _, variant = path_and_variant.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"config file {path!r} does not exist (from {os.getcwd()})")
    try:
        module = runpy.run_path(path)
        if "get_config" not in module:
            raise UserError("defines no get_config(variant='')")
        config = module["get_config"](variant) if variant else module["get_config"]()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:  # the file is the user's: it may raise anything
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else (frames or [1])[-1]
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config() must return what cosup_jax.config.make builds")
    return config


def _told(flags: Mapping[str, str]) -> dict[str, str]:
    """The flags that say which process this is, as the environment would."""
    return {variable: flags[name] for name, variable in JOINING.items() if name in flags}


def _options(flags: Mapping[str, str], mode: str) -> dict[str, int | str]:
    """The mode's own flags. Raises UserError for another mode's, and for a value of no use."""
    found, own = {}, OPTIONS.get(mode, {})
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


def _leaves(group: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in group.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _parse(key: str, text: str, kind: type) -> Any:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{_CONFIG_KEY}{key}={text} must be {wanted}") from None


def _help(flags: Mapping[str, str]) -> str:
    text = USAGE.format(modes="\n".join(f"  {mode:10}{does}" for mode, does in MODES.items()))
    if flags.get("--config"):
        for key, value in _leaves(resolve_config(flags).to_dict()):
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
        liveness.tell(f"{type(error).__name__}: {error}" if code == 1 else str(error), code)


def _run_and_exit() -> None:
    try:
        code = main(sys.argv[1:])
    except Exception as error:
        code = 1
        _tell_the_others(error, code, traceback.print_exc)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        # Not finished together: a normal exit would wait in JAX's shutdown barrier for the others.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _run_and_exit()
