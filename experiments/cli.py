"""The ``ehr`` command: ``ehr VERB --help``. Nothing heavy is imported before the verb is known."""

import difflib
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

VERBS = {
    "synthesize": "write raw files of a simulated hospital system, shaped as MIMIC-IV or eICU",
    "prepare": "extract raw tables, show who is left after each rule and what was charted",
    "train": "train a model and score it; --finetune EICU also transfers it",
    "evaluate": "score a checkpoint on any hospital system",
    "finetune": "transfer a checkpoint: zero-shot score, fine-tuning, score",
    "predict": "write probabilities for patients whose outcome is unknown",
}
HELP = "usage: ehr VERB [options]\n\nPrediction from ICU records.\n\n" + "".join(f"  {v:<12}{text}\n" for v, text in VERBS.items())
HELP += "\nOptions come from flags over a YAML file (-c FILE). `ehr VERB --help` explains them all, `--print_config` shows them filled in.\n"
HELP += "Start with: ehr train -c experiments/configs/demo.yaml --finetune SyntheticEICU\n"
FROM_CHECKPOINT = ("evaluate", "predict")  # verbs whose data default to those of the checkpoint
OURS = ("logger", "callbacks", "default_root_dir", "plugins", "profiler", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
OURS += ("num_sanity_val_steps", "max_time", "fast_dev_run", "inference_mode", "model_registry", "reload_dataloaders_every_n_epochs", "barebones")


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
    if os.environ.get("EHR_TRACEBACK"):
        _run(verb, rest)
        return
    try:
        _run(verb, rest)
    except KeyboardInterrupt:
        _stop("interrupted; `ehr train ... --resume` continues a training run", 130)
    except (ValueError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        _stop(str(error))
    except PermissionError as error:
        _stop(f"no permission for {error.filename or error}: choose another folder or change its rights")
    except OSError as error:
        _stop(f"the disk said: {error}; make room (or choose another folder) and run the same command again" if error.errno else str(error))
    except MemoryError:
        _stop("out of memory: lower --data.batch_size")


def _run(verb: str, arguments: list[str]) -> None:
    import warnings

    for noise in (".*does not have many workers.*", ".*number of training batches.*", ".*exists and is not empty.*", ".*LeafSpec.*", ".*Checkpoint directory.*"):
        warnings.filterwarnings("ignore", noise)
    import logging

    from experiments import verbs

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = make_parser(verb)
    if verb in FROM_CHECKPOINT and not any(a.split("=")[0] in ("--data", "-h", "--help") for a in arguments):
        arguments = [*_data_of_checkpoint(arguments), *arguments]
    configuration = parser.parse_args(arguments)
    kept = configuration.clone()
    for transient in ("config", "resume"):
        kept.pop(transient, None)
    said = parser.dump(kept, skip_validation=True)
    made = parser.instantiate_classes(configuration)
    values = {name: value for name, value in vars(made).items() if name != "config"}
    if verb in ("train", "finetune"):
        values["trainer"] = configuration.trainer.as_dict()
        values["config"] = said
    getattr(verbs, verb)(**values)


def make_parser(verb: str) -> Any:
    """The parser of a verb: the function's own arguments, ``-c FILE`` and, where it trains, ``--trainer.*``."""
    from jsonargparse import ArgumentParser

    from experiments import verbs

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            known = [option for action in self._actions for option in action.option_strings]
            _stop(_explain(message, known, verb))

    function = getattr(verbs, verb)
    parser = Parser(prog=f"ehr {verb}", description=(function.__doc__ or "").split("Args:")[0].strip())
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of these options; flags after it override it.")
    if verb in ("train", "finetune"):
        import lightning

        parser.add_class_arguments(lightning.Trainer, "trainer", skip=set(OURS), instantiate=False)
        parser.set_defaults({"trainer.max_epochs": 30, "trainer.gradient_clip_val": 1.0, "trainer.use_distributed_sampler": False})
        parser.add_argument("--resume", action="store_true", help="Continue a run that was interrupted.")
    parser.add_function_arguments(function, skip={"trainer", "config", "resume"}, as_group=False)
    return parser


def _data_of_checkpoint(arguments: list[str]) -> list[str]:
    """``--data`` flags that repeat the data of the checkpoint; with another ``--data.root`` the choice of files is left open."""
    given = dict(re.findall(r"(--\S+?)(?:=|\s+)(\S+)", " ".join(arguments)))
    if "--ckpt" not in given:
        return []
    from ehrmodels.base import read_checkpoint

    data = read_checkpoint(Path(given["--ckpt"]))["ehr"]["data"]
    keep = {k: v for k, v in data["arguments"].items() if v is not None}
    if "--data.root" in given:
        keep = {k: v for k, v in keep.items() if k not in ("root", "sets", "systems")}
    flags = [f"--data={data['class']}"]
    for name, value in keep.items():
        flags.append(f"--data.{name}={str(value).lower() if isinstance(value, bool) else value}")
    return flags


def _explain(message: str, known: list[str], verb: str) -> str:
    """The parser's message in one line, with the nearest option where one was misspelt."""
    message = " ".join(message.split())
    for word in re.findall(r"--[\w.]+|[Kk]ey \"([\w.]+)\"|'([\w.]+)'", message):
        said = next((w for w in (word if isinstance(word, tuple) else (word,)) if w), "")
        near = difflib.get_close_matches(f"--{said.lstrip('-')}", known, 1, 0.6)
        if near and near[0] != f"--{said.lstrip('-')}":
            message += f"; did you mean {near[0]}?"
            break
    return f"{message}\nsee: ehr {verb} --help"


def _stop(message: str, status: int = 2) -> NoReturn:
    print(f"ehr: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
