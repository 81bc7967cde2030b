"""What went wrong, in the words of the command line: what was typed, expected and probably meant; and whether memory ran out."""

import difflib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

# what people type who know other programs, in the order in which it is looked for
USUAL = {
    "--lr": ("--model.learning_rate", "--learning_rate"),
    "--learning_rate": ("--model.learning_rate", "--learning_rate"),
    "--gpus": ("--trainer.devices", "--workers", "--device"),
    "--gpu": ("--trainer.devices", "--workers", "--device"),
    "--devices": ("--trainer.devices", "--device"),
    "--epochs": ("--trainer.max_epochs", "--epochs"),
    "--max_epochs": ("--trainer.max_epochs", "--epochs"),
    "--trainer.max_epochs": ("--epochs",),
    "--finetune_epochs": ("--epochs",),
    "--finetune_learning_rate": ("--learning_rate",),
    "--batch_size": ("--data.batch_size",),
    "--checkpoint": ("--ckpt",),
    "--ckpt_path": ("--ckpt",),
    "--output": ("--out",),
    "--precision": ("--trainer.precision",),
    "--root": ("--data.root",),
    "--task": ("--data.task",),
    "--split": ("--data.split",),
    "--dataset": ("--data",),
}


def classes(function: Callable[..., Any]) -> dict[str, dict[str, list[str]]]:
    """Option of a verb that takes a model or data -> the classes that it may be -> their arguments."""
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
    options: dict[str, dict[str, list[str]]] = {}
    for name, hint in hints.items():
        base = next((h for h in (hint, *typing.get_args(hint)) if h in bases), None)
        if base is not None:
            options[name] = {kind.__name__: parameters(kind) for kind in below(base)}
    return options


def explain(
    message: str, arguments: Sequence[str], options: list[str], classes: dict[str, dict[str, list[str]]]
) -> str:
    """The parser's message in the words of the command line, with the nearest option where one was misspelt."""
    message = " ".join(message.split())
    of_classes = [
        f"--{option}.{p}" for option, kinds in classes.items() for parameters in kinds.values() for p in parameters
    ]
    offered = list(dict.fromkeys([*options, *of_classes]))
    flags = [a.split("=")[0] for a in arguments if a.startswith("--")]

    def written(key: str) -> str:
        """The flag as the user wrote it, where the parser names only the last part of it."""
        return next(
            (f for f in flags if f == f"--{key}"), next((f for f in flags if f.endswith(f".{key}")), f"--{key}")
        )

    if wrong := re.search(r"unrecognized arguments: (.*)|[Oo]ption '([\w.]+)'", message):
        name = (wrong[1] or wrong[2]).split()[0].split("=")[0]
        if wrong[1] and not name.startswith("-"):
            return f"{name!r} is not understood: expected only flags, such as --data NAME"
        group = re.search(r"Group '([\w.]+)'", message)
        flag = name if wrong[1] else written(f"{group[1]}.{name}" if group and not name.startswith(group[1]) else name)
        if flag not in flags:  # from a YAML file, where the parser says only the last part
            last = list(dict.fromkeys(option.lstrip("-").rsplit(".", 1)[-1] for option in offered))
            near = difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1, 0.6)
            return f"unknown key {name!r} in the YAML file" + (f"; did you mean {near[0]}?" if near else "")
        if flag in of_classes:
            return _of_another_class(flag, arguments, classes)
        usual = [option for option in USUAL.get(flag, ()) if option in offered]
        near = usual[:1] or difflib.get_close_matches(flag, offered, 1, 0.6)
        return f"unknown option {flag}" + (f"; did you mean {near[0]}?" if near else "")
    if missing := re.search(r"arguments are required: (.*)", message):
        return f"missing {' and '.join(f'--{name.strip()}' for name in missing[1].split(','))}"
    if wrong := re.search(r"[Kk]ey \"([\w.]+)\": (.*)", message):
        key, reason = wrong[1], wrong[2]
        value = re.search(
            r"(?:Got value|Given value|import path string|not import-able|Unable to import): ?(.*?)(?= - Expected| Given value|$)",
            reason,
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
        if key in ("trainer.logger", "trainer.callbacks") and value:
            kind = key.rpartition(".")[2].rstrip("s")
            return f"{written(key)} {value[1]}: expected the name of a {kind} of lightning.pytorch, or of a class that can be imported"
        kinds = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\](?=\.| |$))", reason)
        if kinds and value:
            expected = [
                literal.replace("'", "") or {"NoneType": "null", "str": "text"}.get(kind, kind)
                for kind, literal in kinds
            ]
            expected = [kind for kind in dict.fromkeys(expected) if kind != "null"] or expected
            return f"{written(key)}: expected {' or '.join(expected)}, found {value[1]}"
        if "does not exist" in reason:
            return f"--{key}: {reason}"
    if wrong := re.search(r"class_path '([\w.]+)': (.*)", message):
        return f"{wrong[1]} cannot be imported ({wrong[2]}): is its file in this folder, or on PYTHONPATH?"
    return message.replace("Problems parsing config:", "the YAML file cannot be read:")


def of_words(message: str, verb: str, name: str, word: str) -> str | None:
    """What to say of the argument ``name`` of a verb that takes words and no flag; None where the message is on something else."""
    usage = f"ehr {verb} {word} {word} --option value"
    if re.search(rf"arguments are required: {name}\b", message):
        return f"no {word} is named: expected {usage}"
    stray = re.search(r"unrecognized arguments: ([^-\s]\S*)", message)
    return f"{stray[1]!r} stands apart: name every {word} in one place, as in {usage}" if stray else None


def _of_another_class(flag: str, arguments: Sequence[str], classes: dict[str, dict[str, list[str]]]) -> str:
    """What to say of an option that there is, but not for the class that was chosen."""
    option, _, parameter = flag.lstrip("-").partition(".")
    parameter = parameter.partition(".")[0]
    owners = [kind for kind, parameters in classes[option].items() if parameter in parameters]
    following = [*arguments[1:], ""]
    named = [
        a.partition("=")[2] or after
        for a, after in zip(arguments, following, strict=False)
        if a.partition("=")[0] == f"--{option}"
    ]
    chosen = named[-1].rpartition(".")[2] if named else ""
    owners = [owner for owner in owners if owner != chosen]  # which the parser does not see hand the option on
    return f"{flag} is an option of {', '.join(owners)}" + f", not of {chosen}" * bool(chosen)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is out: of a GPU, in one of its libraries, or of the machine."""
    words = r"out of memory|can't allocate memory|STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(words, str(error)) is not None
    )
