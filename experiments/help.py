"""What ``ehr --help`` and ``ehr VERB --help`` print, read from the verbs' docstrings without importing them, so at once."""

import ast
import re
import shutil
import textwrap
from pathlib import Path

VERBS = {
    "synthesize": "write raw files of a simulated hospital system, shaped as MIMIC-IV or eICU",
    "prepare": "extract raw tables, show who is left after each rule and what was charted",
    "train": "train a model and score it; --finetune EICU also transfers it",
    "sweep": "search hyper-parameters of train with many processes, on one machine or several",
    "benchmark": "train models x seeds x data sets with many processes, and compare them",
    "evaluate": "score a checkpoint on any hospital system",
    "finetune": "transfer a checkpoint: zero-shot score, fine-tuning, score",
    "compare": "show runs side by side, with paired differences on the same patients",
    "predict": "write probabilities for patients whose outcome is unknown",
    "explain": "show which variables a model's predictions rest on, and test that",
    "export": "write a checkpoint as ONNX or torch.export, for programs without this package",
}
EXAMPLES = {
    "synthesize": "ehr synthesize --out data/synthetic-mimiciv --stays 5000",
    "prepare": "ehr prepare --data MIMICIV --data.root data/mimiciv --out tables",
    "train": "ehr train -c fusion_mimiciv --name icu --finetune EICU",
    "sweep": "ehr sweep -c sweep_demo --workers 2",
    "benchmark": "ehr benchmark -c benchmark_demo --workers 2",
    "evaluate": "ehr evaluate --ckpt runs/icu/best.ckpt --data EICU --out scores",
    "compare": "ehr compare runs/fusion runs/hymate --reference runs/fusion --out compared",
    "finetune": "ehr finetune --ckpt runs/icu/best.ckpt --data.root data/eicu",
    "predict": "ehr predict --ckpt runs/icu/best.ckpt --data.root data/new --out risk.csv",
    "explain": "ehr explain --ckpt runs/icu/best.ckpt --out explained",
    "export": "ehr export --ckpt runs/icu/best.ckpt --out icu.onnx",
}
TRAINER = {  # the arguments of lightning.Trainer that matter
    "trainer.max_epochs": "Most epochs; default: 30.",
    "trainer.devices": "Processes of this machine, a GPU each where there are any; default: 1.",
    "trainer.precision": "Such as 32-true or bf16-mixed; default: bf16-mixed on a GPU.",
}
HIDDEN = ("transfer.draw", "transfer.weight", "transfer.workers", "trainer", "trial", "config")
POSITIONAL = {
    "compare": ("runs", "RUN")
}  # verb -> its argument that takes no flag but as many words as are given, and one of them
WITHOUT_DATA = ("synthesize", "export", "compare", "benchmark")  # verbs that take no options of data


def overview() -> str:
    """The verbs, and where to begin."""
    verbs = "".join(_filled(text, f"  {verb:<12}", 14) + "\n" for verb, text in VERBS.items())
    end = [
        "Options come from flags over a YAML file (-c FILE, or -c NAME of a shipped one). `ehr VERB --help` explains them, "
        "`--print_config` shows them filled in; `ehr train --model.help Fusion` and `--data.help EICU` explain those of a "
        "model and of a hospital system.",
        "Shell completion: source <(ehr --completion bash). Version: ehr --version.",
        "Start with: ehr train -c demo --finetune SyntheticEICU",
    ]
    tail = "\n".join(_filled(line) for line in end)
    return f"usage: ehr VERB [options]\n\nPrediction from ICU records.\n\n{verbs}\n{tail}\n"


def screen(verb: str) -> str:
    """The options of a verb that matter, a line or two each."""
    text, options = documented(verb)
    words = f" {POSITIONAL[verb][1]} {POSITIONAL[verb][1]} ..." if verb in POSITIONAL else ""
    lines = [f"usage: ehr {verb}{words} [-c FILE] [options]", "", _filled(text), ""]
    if verb in ("train", "finetune", "sweep"):
        options |= {k: v for k, v in TRAINER.items() if not (verb == "finetune" and k == "trainer.max_epochs")}
    for name, about in options.items():
        flag = POSITIONAL[verb][1] if name in POSITIONAL.get(verb, ()) else f"--{name}"
        short = len(flag) < 24
        lines += [] if short else [f"  {flag}"]
        lines.append(_filled(about, f"  {flag:<24} " if short else " " * 27, 27))
    more = [] if verb in WITHOUT_DATA else [f"ehr {verb} --data.help MIMICIV   options of the data"]
    if verb in ("train", "sweep"):
        more.append(f"ehr {verb} --model.help Fusion   options of the model")
    if verb == "sweep":
        more.append("and every option of `ehr train`")
    lines += ["", *more, f"ehr {verb} --help-all   everything", "", f"example: {EXAMPLES[verb]}", ""]
    return "\n".join(lines)


def completion(shell: str) -> str:
    """A script for the shell that completes verbs, flags and files."""
    cases = "\n".join(
        f'    {verb}) words="{" ".join(f"--{o}" for o in [*documented(verb)[1], "config", "help", "help-all"] if o not in POSITIONAL.get(verb, ()))}" ;;'
        for verb in VERBS
    )
    bash = f"""_ehr() {{
  local words="{" ".join(VERBS)}"
  if [ "$COMP_CWORD" -gt 1 ]; then
    words=""
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _ehr ehr
"""
    return bash if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{bash}"


def documented(verb: str) -> tuple[str, dict[str, str]]:
    """First paragraph of a verb's docstring, and option -> the first words on it."""
    path = Path(__file__).parent / ("sweep/command.py" if verb == "sweep" else f"{verb}.py")
    doc = _docstring(path, verb)
    options = _arguments(doc)
    if "transfer" in options:
        parts = _arguments(_docstring(Path(__file__).parent / "strategies.py", "Transfer"))
        options = {
            name: about
            for key, text in options.items()
            for name, about in (
                {f"transfer.{k}": v for k, v in parts.items()} if key == "transfer" else {key: text}
            ).items()
        }
    first = " ".join(doc.split("\n\n")[0].split())
    short = {name: re.split(r"\.\s|;", f"{about} ")[0].strip() for name, about in options.items() if name not in HIDDEN}
    return first, {name: f"{about.rstrip('.')}." for name, about in short.items()}


def _docstring(path: Path, name: str) -> str:
    """Of a function or class in a file, which is not imported for it."""
    nodes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return ast.get_docstring(next(node for node in nodes if node.name == name)) or ""


def _arguments(doc: str) -> dict[str, str]:
    """Name -> what a docstring says of it under ``Args``."""
    arguments = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.M | re.S)
    options: dict[str, str] = {}
    for line in (arguments[1] if arguments else "").splitlines():
        if entry := re.match(r"    (\w+): (.*)", line):
            options[entry[1]] = entry[2]
        elif options and line.strip():
            options[next(reversed(options))] += f" {line.strip()}"
    return options


def _filled(text: str, start: str = "", indent: int = 0) -> str:
    """``text`` in lines as wide as the terminal, at most 99 characters."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100) - 1
    return textwrap.fill(text, width, initial_indent=start, subsequent_indent=" " * indent, break_on_hyphens=False)
