"""The ``ehr`` command: ``ehr VERB --help``. Nothing heavy is imported before the verb is known."""

import difflib
import importlib
import inspect
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from experiments.settings import TRAINER_DEFAULTS

VERBS = {
    "synthesize": "write raw files of a simulated hospital system, shaped as MIMIC-IV or eICU",
    "prepare": "extract raw tables, show who is left after each rule and what was charted",
    "train": "train a model and score it; --finetune EICU also transfers it",
    "sweep": "search hyper-parameters of train with many processes, on one machine or several",
    "evaluate": "score a checkpoint on any hospital system",
    "finetune": "transfer a checkpoint: zero-shot score, fine-tuning, score",
    "predict": "write probabilities for patients whose outcome is unknown",
    "explain": "show which variables the predictions of a HyMaTE model rest on, and test that",
}
HELP = "usage: ehr VERB [options]\n\nPrediction from ICU records.\n\n" + "".join(
    f"  {v:<12}{text}\n" for v, text in VERBS.items()
)
HELP += "\nOptions come from flags over a YAML file (-c FILE). `ehr VERB --help` explains them, `--print_config` shows them filled in.\n"
HELP += "`ehr train --model.help Fusion` and `ehr train --data.help EICU` explain those of a model and of a hospital system.\n"
HELP += "Start with: ehr train -c experiments/configs/demo.yaml --finetune SyntheticEICU\n"
FROM_CHECKPOINT = ("evaluate", "predict", "explain")  # verbs whose data default to those of the checkpoint
OURS = (  # arguments of lightning.Trainer that are not offered: ``run.fit`` sets them, or they would break --resume
    *("logger", "callbacks", "default_root_dir", "plugins", "profiler", "enable_progress_bar", "enable_model_summary"),
    *("enable_checkpointing", "num_sanity_val_steps", "max_time", "fast_dev_run", "inference_mode", "model_registry"),
    *("reload_dataloaders_every_n_epochs", "barebones"),
)
WITHOUT_TORCH = ("synthesize", "prepare")  # verbs that know of hospitals, but of no data modules
OF_TRIALS = {"data", "trainer", "monitor"}  # arguments of ``sweep`` that its trials have too
NO_MEMORY = "out of memory: lower --data.batch_size"


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; a user's mistake ends with one message and exit status 2, without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        _stop(f"unknown verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"choose among {', '.join(VERBS)}"))
    guarded(lambda: _run(verb, rest), f"ehr {verb} --help")


def guarded(command: Callable[[], None], help: str) -> None:
    """Run a command; a user's mistake ends the process with one message, without a traceback (but with EHR_TRACEBACK set)."""
    if os.environ.get("EHR_TRACEBACK"):
        command()
        return
    try:
        command()
    except KeyboardInterrupt:
        _stop("interrupted; the same command continues, with --resume where it was training", 130)
    except (ValueError, FileNotFoundError) as error:
        _stop(str(error))
    except PermissionError as error:
        _stop(f"no permission for {error.filename or error}: choose another folder or change its rights")
    except (NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        expected = "file" if isinstance(error, IsADirectoryError) else "folder"
        _stop(f"{error.filename}: {error.strerror}; expected a {expected}; choose another path")
    except OSError as error:
        _stop(
            f"the disk said: {error}; make room (or choose another folder) and run the same command again"
            if error.errno
            else str(error)
        )
    except MemoryError:
        _stop(NO_MEMORY)
    except Exception as error:
        name = type(error).__name__  # classes of torch and lightning, which are not imported here
        if name == "OutOfMemoryError":
            _stop(NO_MEMORY)
        if name == "MisconfigurationException":
            _stop(f"{error}; change --trainer.*, see: {help}")
        raise


def _run(verb: str, arguments: list[str]) -> None:
    values = configured(verb, arguments)
    getattr(_verbs(verb), verb)(**values)


def configured(verb: str, arguments: list[str]) -> dict[str, Any]:
    """What the command line says, as the arguments of the verb's function: models and data are made, ``config`` is all of it as YAML."""
    import logging
    import warnings

    for noise in (
        "does not have many workers",
        "number of training batches",
        "exists and is not empty",
        "LeafSpec",
        "Checkpoint directory",
        "your dataloader is not resumable",
        "`srun` command is available",
    ):
        warnings.filterwarnings("ignore", f".*{noise}.*")
    arguments = _ordered(arguments)
    if verb in FROM_CHECKPOINT:
        inherited = _data_of_checkpoint(arguments)
        named = inherited or any(a.partition("=")[0] == "--data" for a in arguments)
        everyone = ["--data.split=all"] if verb == "predict" and named else []  # new patients belong to no split
        arguments = _ordered([*inherited, *everyone, *arguments])
    names = [a.partition("=")[0] for a in arguments]
    if (
        verb == "finetune"
        and any(n.startswith("--data.") for n in names)
        and not {"--data", "-c", "--config"} & set(names)
    ):
        arguments = ["--data=EICU", *arguments]  # the default of ``verbs.finetune``, whose arguments these are
    own = set(inspect.signature(getattr(_verbs(verb), verb)).parameters)
    with _data_modules_hidden() if verb in WITHOUT_TORCH else nullcontext():
        parser = make_parser(verb, arguments)
        for name in ("lightning.pytorch", "lightning.fabric"):  # imported by now: the import sets another level
            logging.getLogger(name).setLevel(logging.ERROR)
        configuration = parser.parse_args(arguments)
        kept = configuration.clone()
        for transient in {"config", "resume"} | (own - OF_TRIALS if verb == "sweep" else set()):
            kept.pop(transient, None)
        said = parser.dump(kept, skip_validation=True)
        made = parser.instantiate(configuration)
    values = {name: value for name, value in vars(made).items() if name in own}
    if "trainer" in own:
        values |= {"trainer": configuration.trainer.as_dict(), "config": said}
    return values


def _verbs(verb: str) -> ModuleType:
    files = {"synthesize": "prepare", "prepare": "prepare", "explain": "explain", "sweep": "sweep.command"}
    return importlib.import_module(f"experiments.{files.get(verb, 'verbs')}")


def make_parser(verb: str, arguments: Sequence[str] = ()) -> Any:
    """The parser of a verb: the function's own arguments, ``-c FILE`` and, where it trains, ``--trainer.*``.

    Args:
        verb: one of ``VERBS``.
        arguments: what will be parsed, to name in messages what the user wrote.
    """
    from jsonargparse import ArgumentParser

    function = getattr(_verbs(verb), verb)
    trained = _verbs("train").train if verb == "sweep" else function  # whose flags are offered, too

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            options = [
                option for action in parser._actions for option in action.option_strings
            ]  # ``self`` may be that of a class
            classes = {name: kinds for name, kinds in _classes(trained).items() if f"--{name}" in options}
            _stop(f"{_explain(message, arguments, options, classes)}\nsee: ehr {verb} --help")

        def parse_args(self, args: Any = None, *more: Any, **others: Any) -> Any:  # type: ignore[override]
            named = _hospitals(sys.argv[1:] if args is None else args) if verb in WITHOUT_TORCH else args
            return super().parse_args(named, *more, **others)

    parser = Parser(prog=f"ehr {verb}", description=_description(function.__doc__ or "", verb), allow_abbrev=False)
    parser.add_argument(
        "-c", "--config", action="config", help="YAML file with any of these options; flags override it."
    )
    ours: set[str | int] = {"trainer", "config", "resume", "trial"}
    parser.add_function_arguments(function, skip={*ours, *(OF_TRIALS if verb == "sweep" else ())}, as_group=False)
    if verb == "sweep":
        others = {"name", "runs", "finetune", "finetune_learning_rate", "finetune_epochs"}
        parser.add_function_arguments(trained, skip={*ours, *others}, as_group=False)
    if verb in ("train", "finetune", "sweep"):
        import lightning

        if verb != "sweep":
            parser.add_argument("--resume", action="store_true", help="Continue a run that was interrupted.")
        parser.add_class_arguments(lightning.Trainer, "trainer", skip=set(OURS), instantiate=False)
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
    return parser


def _description(doc: str, verb: str) -> str:
    hints = [] if verb == "synthesize" else [f"`ehr {verb} --data.help MIMICIV` lists the options of the data"]
    hints += [f"`ehr {verb} --model.help Fusion` those of the model"] if verb in ("train", "sweep") else []
    return "\n\n".join([doc.split("Args:")[0].strip(), ", ".join(hints) + "." * bool(hints)])


def _ordered(arguments: list[str]) -> list[str]:
    """The same arguments, files first, then the choice of classes, since the parser lets whatever comes later win."""
    first: list[str] = []
    second: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            argument = name = "--" + name[2:].replace("-", "_")  # --init-from is --init_from
            argument += equals + value
        place = (
            first if name in ("-c", "--config") else second if name in ("--data", "--model", "--finetune") else others
        )
        place.append(argument)
        if place is not others and not equals:
            place.extend(list(itertools.islice(rest, 1)))
    return [*first, *second, *others]


def _hospitals(arguments: Sequence[str]) -> list[str]:
    """``--data EICU`` as the hospital itself and not its data module, which bears the same name where it has been imported."""
    from datamodules import hospitals

    named = {name: f"datamodules.hospitals.{name}" for name in hospitals.__all__}
    kept, before = [], ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in ("--data", "--data.help") and equals:
            argument = f"{flag}={named.get(value, value)}"
        elif before in ("--data", "--data.help"):
            argument = named.get(argument, argument)
        kept.append(argument)
        before = argument
    return kept


@contextmanager
def _data_modules_hidden() -> Iterator[None]:
    """Meanwhile there is no ``datamodules.EICU``: the parser looks there for every class that it meets, which would load torch."""
    import datamodules

    lazily = vars(datamodules).pop("__getattr__")
    try:
        yield
    finally:
        vars(datamodules)["__getattr__"] = lazily


def _data_of_checkpoint(arguments: list[str]) -> list[str]:
    """``--data`` flags that repeat the data of the checkpoint; with another ``--data.root`` the choice of files is left open."""
    given: dict[str, str] = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        given[name] = value if equals else following
    if "--data" in given or "--ckpt" not in given:
        return []
    from ehrmodels.base import read_checkpoint

    data = read_checkpoint(Path(given["--ckpt"]))["ehr"]["data"]
    keep = {name: value for name, value in data["arguments"].items() if value is not None}
    if "--data.root" in given:
        keep = {name: value for name, value in keep.items() if name not in ("root", "sets", "systems")}
    return [
        f"--data={data['class']}",
        *(f"--data.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in keep.items()),
    ]


def _classes(function: Callable[..., Any]) -> dict[str, dict[str, list[str]]]:
    """Option of a verb that takes a model or data -> the classes that it may be -> their arguments."""
    import inspect
    import typing

    from datamodules.hospitals.base import Hospital

    bases: tuple[Any, ...] = (Hospital,)
    if "torch" in sys.modules:  # else the verb knows of no model and no data module
        from datamodules.module import ICUDataModule
        from ehrmodels.base import ICUModule

        bases = (ICUModule, ICUDataModule, Hospital)

    def below(base: Any) -> list[type]:
        return [c for derived in base.__subclasses__() for c in (derived, *below(derived))]

    def parameters(kind: type) -> list[str]:
        ours = [c for c in kind.__mro__ if "__init__" in vars(c) and issubclass(c, bases)]
        return [p for p in dict.fromkeys(p for c in ours for p in inspect.signature(c).parameters) if p != "kwargs"]

    hints = typing.get_type_hints(function)
    found: dict[str, dict[str, list[str]]] = {}
    for name, hint in hints.items():
        base = next((h for h in (hint, *typing.get_args(hint)) if h in bases), None)
        if base is not None:
            found[name] = {kind.__name__: parameters(kind) for kind in below(base)}
    return found


def _explain(
    message: str, arguments: Sequence[str], options: list[str], classes: dict[str, dict[str, list[str]]]
) -> str:
    """The parser's message in the words of the command line, with the nearest option where one was misspelt."""
    message = " ".join(message.split())
    of_classes = [
        f"--{option}.{p}" for option, kinds in classes.items() for parameters in kinds.values() for p in parameters
    ]
    known = list(dict.fromkeys([*options, *of_classes]))
    flags = [a.split("=")[0] for a in arguments if a.startswith("--")]

    def written(key: str) -> str:
        """The flag as the user wrote it, where the parser names only the last part of it."""
        return next(
            (f for f in flags if f == f"--{key}"), next((f for f in flags if f.endswith(f".{key}")), f"--{key}")
        )

    if wrong := re.search(r"unrecognized arguments: (.*)|[Oo]ption '([\w.]+)'", message):
        said = (wrong[1] or wrong[2]).split()[0].split("=")[0]
        if wrong[1] and not said.startswith("-"):
            return f"{said!r} is not understood: expected only flags, such as --data NAME"
        group = re.search(r"Group '([\w.]+)'", message)
        flag = said if wrong[1] else written(f"{group[1]}.{said}" if group and not said.startswith(group[1]) else said)
        near = difflib.get_close_matches(flag, known, 1, 0.6)
        if flag not in flags:  # from a YAML file, where the parser says only the last part
            last = list(dict.fromkeys(k.lstrip("-").rsplit(".", 1)[-1] for k in known))
            near = difflib.get_close_matches(said.rsplit(".", 1)[-1], last, 1, 0.6)
        what = f"unknown option {flag}" if flag in flags else f"unknown key {said!r} in the YAML file"
        return what + (f"; did you mean {near[0]}?" if near else "")
    if missing := re.search(r"arguments are required: (.*)", message):
        return f"missing {' and '.join(f'--{name.strip()}' for name in missing[1].split(','))}"
    if wrong := re.search(r"[Kk]ey \"([\w.]+)\": (.*)", message):
        key, reason = wrong[1], wrong[2]
        value = re.search(
            r"(?:Got value|Given value|import path string|not import-able|Unable to import): ?(.*)", reason
        )
        choose = f"choose among {', '.join(classes.get(key, ()))}"
        nested = next((f for f in flags if f.startswith(f"--{key}.")), "")
        if key in classes and nested and f"--{key}" not in flags and ("NestedArg" in reason or "is abstract" in reason):
            return f"{nested} is given without --{key}; {choose}"
        if key in classes and value:
            lower = {name.lower(): name for name in classes[key]}
            near = difflib.get_close_matches(value[1].lower(), lower, 1, 0.5)
            return f"--{key} {value[1]} is not known; " + (f"did you mean {lower[near[0]]}?" if near else choose)
        if key in classes and "is abstract" in reason:
            return f"--{key} names no concrete class; {choose}"
        kinds = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\](?=\.| |$))", reason)
        if kinds and value:
            expected = [
                literal.replace("'", "") or {"NoneType": "null", "str": "text"}.get(kind, kind)
                for kind, literal in kinds
            ]
            return f"{written(key)}: expected {' or '.join(dict.fromkeys(expected))}, found {value[1]}"
        if "does not exist" in reason:
            return f"--{key}: {reason}"
    return message.replace("Problems parsing config:", "the YAML file cannot be read:")


def _stop(message: str, status: int = 2) -> NoReturn:
    print(f"ehr: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
