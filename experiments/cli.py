"""The ``ehr`` command: ``ehr VERB --help``. Nothing heavy is imported before the verb is known."""  # part of ehr: start.py looks for these words

import difflib
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from experiments import help, mistakes
from experiments.imports import imported
from experiments.settings import TRAINER_DEFAULTS

FROM_CHECKPOINT = ("evaluate", "predict", "explain")  # verbs whose data default to those of the checkpoint
OURS = (  # arguments of lightning.Trainer that are not offered: ``fit.fit`` sets them, or they would break --resume
    *("default_root_dir", "plugins", "profiler", "enable_progress_bar", "enable_model_summary", "overfit_batches"),
    *("enable_checkpointing", "num_sanity_val_steps", "max_time", "fast_dev_run", "inference_mode", "model_registry"),
    *("reload_dataloaders_every_n_epochs", "barebones"),
)
WITHOUT_TORCH = ("synthesize", "prepare")  # verbs that know of hospitals, but of no data modules
OF_TRIALS = {"model", "data", "trainer", "monitor"}  # arguments of ``sweep`` that its trials have too
OF_FILES = ("root", "sets", "systems", "stays", "simulation_seed")  # options of the data that choose files
NO_MEMORY = "out of memory: lower --data.batch_size (and raise --trainer.accumulate_grad_batches, to train alike)"


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; a user's mistake ends with one message and exit status 2, without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help.overview(), end="")
        return
    if arguments[0] == "--version":
        print(f"ehr {metadata.version('ehr')}")
        return
    if arguments[0].startswith("--completion"):
        shell = arguments[0].partition("=")[2] or next(iter(arguments[1:]), "")
        if shell not in ("bash", "zsh"):
            _stop(f"--completion {shell}: expected bash or zsh, as in: source <(ehr --completion bash)")
        print(help.completion(shell), end="")
        return
    verb, rest = arguments[0], arguments[1:]
    if verb not in help.VERBS:
        near = difflib.get_close_matches(verb, help.VERBS, 1)
        choose = f"did you mean {near[0]}?" if near else f"choose among {', '.join(help.VERBS)}"
        _stop(
            f"unknown verb {verb!r}; {choose}"
            if not verb.startswith("-")
            else f"expected a verb before {verb}: {choose}"
        )
    if {"-h", "--help"} & set(rest):
        print(help.screen(verb), end="")
        return
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
        _stop(str(error) if _raised_here(error) else f"{error} (EHR_TRACEBACK=1 shows where in the code)")
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
    except Exception as error:
        name = type(error).__name__  # classes of torch and lightning, which are not imported here
        if mistakes.out_of_memory(error):
            _stop(NO_MEMORY)
        if name == "MisconfigurationException":
            _stop(f"{error}; change --trainer.*, see: {help}")
        raise


def _raised_here(error: BaseException) -> bool:
    """Whether an error is a message of ours, and not one of a library's that came this far."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = Path(trace.tb_frame.f_code.co_filename).resolve() if trace is not None else Path()
    return trace is None or (
        Path(__file__).resolve().parents[1] in where.parents
        and "site-packages" not in str(where.relative_to(Path(__file__).resolve().parents[1]))
    )


def _run(verb: str, arguments: list[str]) -> None:
    if "--help-all" in arguments:
        make_parser(verb, arguments).print_help()
        return
    getattr(_verbs(verb), verb)(**configured(verb, arguments))


def configured(verb: str, arguments: list[str]) -> dict[str, Any]:
    """What the command line says, as the arguments of the verb's function: models and data are made, ``config`` is all of it as YAML."""
    _print_remarks()
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, for classes of the user's own such as --model mymodels.GRU
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
        arguments = ["--data=EICU", *arguments]  # the default of ``finetune``, whose arguments these are
    own = set(inspect.signature(getattr(_verbs(verb), verb)).parameters)
    with _data_modules_hidden() if verb in WITHOUT_TORCH else nullcontext():
        parser = make_parser(verb, arguments)
        configuration = parser.parse_args(arguments)
        kept = configuration.clone()
        for transient in {"config", "resume"} | (own - OF_TRIALS if verb == "sweep" else set()):
            kept.pop(transient, None)
        text = parser.dump(kept, skip_validation=True) if "config" in own else ""
        trainer = configuration.pop("trainer", None)
        made = parser.instantiate(configuration)
    values = {name: value for name, value in vars(made).items() if name in own}
    if "trainer" in own and trainer is not None:
        values["trainer"] = {k: v for k, v in trainer.as_dict().items() if v is not None or k in TRAINER_DEFAULTS}
    if "config" in own:
        values["config"] = text
    if verb in ("train", "sweep", "benchmark") and values["name"] is None and (files := _files(arguments)):
        seed = values.get("seed", 0)
        values["name"] = f"{Path(files[-1]).stem}-{seed}" if seed else Path(files[-1]).stem
    return values


def _print_remarks() -> None:
    """What the packages log for people goes where everything else is printed."""
    import logging

    from rich.markup import escape

    from experiments.files import console

    class Printed(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(f"[yellow]{escape(record.getMessage())}[/]", soft_wrap=True, highlight=False)

    for package in ("datamodules", "ehrmodels"):
        logger = logging.getLogger(package)
        logger.handlers = [Printed(logging.WARNING)]


def _verbs(verb: str) -> ModuleType:
    return imported("experiments.sweep.command" if verb == "sweep" else f"experiments.{verb}")


def make_parser(verb: str, arguments: Sequence[str] = ()) -> Any:
    """The parser of a verb: the function's own arguments, ``-c FILE`` and, where it trains, ``--trainer.*``.

    Args:
        verb: one of ``VERBS``.
        arguments: what will be parsed, to name in messages what the user wrote.
    """
    from jsonargparse import ArgumentParser

    function = getattr(_verbs(verb), verb)
    trained = _verbs("train").train if verb == "sweep" else function  # whose flags are offered, too
    words, word = help.POSITIONAL.get(verb, ("", ""))

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            options = [
                option for action in parser._actions for option in action.option_strings
            ]  # ``self`` may be that of a class
            if words and (told := mistakes.of_words(message, verb, words, word)):
                _stop(f"{told}\nsee: ehr {verb} --help")
            classes = {name: kinds for name, kinds in mistakes.classes(trained).items() if f"--{name}" in options}
            _stop(f"{mistakes.explain(message, arguments, options, classes)}\nsee: ehr {verb} --help")

        def parse_args(self, args: Any = None, *more: Any, **others: Any) -> Any:  # type: ignore[override]
            named = _hospitals(sys.argv[1:] if args is None else args) if verb in WITHOUT_TORCH else args
            return super().parse_args(named, *more, **others)

    parser = Parser(prog=f"ehr {verb}", description=_description(function.__doc__ or "", verb), allow_abbrev=False)
    parser.add_argument(
        "-c", "--config", action="config", help="YAML file with any of these options; flags override it."
    )
    ours: set[str | int] = {"trainer", "config", "resume", "trial"}
    if words:
        parser.add_argument(words, nargs="+", metavar=word, help=help.documented(verb)[1][words])
    skipped = {*ours, words, *(OF_TRIALS if verb == "sweep" else ())}
    parser.add_function_arguments(function, skip=skipped, as_group=False)
    if verb == "sweep":
        others = {"name", "runs", "finetune", "finetune_learning_rate", "finetune_epochs", "transfer"}
        parser.add_function_arguments(trained, skip={*ours, *others}, as_group=False)
    if verb in ("train", "finetune", "sweep"):
        import lightning

        if verb != "sweep":
            parser.add_argument("--resume", action="store_true", help="Continue a run that was interrupted.")
        ours_too = {*OURS, "max_epochs"} if verb == "finetune" else set(OURS)  # it has --epochs
        parser.add_class_arguments(lightning.Trainer, "trainer", skip=ours_too, instantiate=False)
        parser.set_defaults({f"trainer.{k}": v for k, v in TRAINER_DEFAULTS.items() if k not in ours_too})
    return parser


def _description(doc: str, verb: str) -> str:
    hints = [] if verb in help.WITHOUT_DATA else [f"`ehr {verb} --data.help MIMICIV` lists the options of the data"]
    hints += [f"`ehr {verb} --model.help Fusion` those of the model"] if verb in ("train", "sweep") else []
    return "\n\n".join([doc.split("Args:")[0].strip(), ", ".join(hints) + "." * bool(hints)])


def config_file(name: str) -> str:
    """A YAML file, or one of those that are shipped, by its name."""
    path = Path(name)
    shipped = Path(__file__).parent / "configs" / f"{path.stem}.yaml"
    if path.exists() or not shipped.exists() or path.suffix not in ("", ".yaml"):
        return name
    return str(shipped)


def _files(arguments: Sequence[str]) -> list[str]:
    """The YAML files among ordered arguments."""
    return [a.partition("=")[2] for a in arguments if a.startswith("--config=")]  # as ``_ordered`` writes them


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
        if place is first:
            place.append(f"--config={config_file(value if equals else next(rest, ''))}")
            continue
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
    import yaml

    written: dict[str, Any] = {}
    for file in _files(arguments):
        try:
            content = yaml.safe_load(Path(file).read_text())
        except (OSError, yaml.YAMLError):
            continue  # the parser says so
        written |= {f"--{name}": value for name, value in content.items()} if isinstance(content, dict) else {}
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        written[name] = value if equals else following
    if "--data" in written or "--ckpt" not in written:
        return []
    from experiments.evaluate import data_of

    kind, keep = data_of(str(written["--ckpt"]))
    if "--data.root" in written:
        keep = {name: value for name, value in keep.items() if name not in OF_FILES}
    return [
        f"--data={kind}",
        *(f"--data.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in keep.items()),
    ]


def _stop(message: str, status: int = 2) -> NoReturn:
    print(f"ehr: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
