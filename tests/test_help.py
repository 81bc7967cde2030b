"""What the command says before it does anything: one screen a verb, at once; completion; and what was probably meant."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import help
from experiments.cli import _verbs, main
from experiments.mistakes import USUAL

CODE = "import sys; from experiments.cli import main; main(sys.argv[1:]); print([m for m in ('torch', 'polars', 'lightning', 'jsonargparse') if m in sys.modules])"


def printed(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    main(line.split())
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", help.VERBS)
def test_help_is_one_screen_with_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(f"{verb} --help", capsys)
    assert len(text.splitlines()) <= 50 and max(map(len, text.splitlines())) <= 100
    for name in inspect.signature(getattr(_verbs(verb), verb)).parameters:
        flag = help.POSITIONAL[verb][1] if name in help.POSITIONAL.get(verb, ()) else f"--{name}"
        assert name in help.HIDDEN or any(f"{flag}{end}" in text for end in (" ", "\n", ".")), name
    assert help.EXAMPLES[verb] in text


@pytest.mark.parametrize("verb", ["train", "sweep"])
def test_help_imports_nothing_heavy(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, verb, "--help"], capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout.strip().endswith("[]")


def test_all_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("train --help-all", capsys)
    assert "--trainer.gradient_clip_val" in text and "--checkpoint_minutes" in text


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed("--version", capsys) == "ehr 0.1.0\n"


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed("--completion bash", capsys)
    ask = "COMP_WORDS=({words}); COMP_CWORD={at}; _ehr; echo ${{COMPREPLY[@]}}"

    def completed(*words: str) -> list[str]:
        code = script + ask.format(words=" ".join(words), at=len(words) - 1)
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert completed("ehr", "ev") == ["evaluate"]
    assert completed("ehr", "train", "--finetune_") == ["--finetune_learning_rate", "--finetune_epochs"]
    assert "bashcompinit" in printed("--completion zsh", capsys)


def test_shipped_configurations_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "experiments/configs/demo.yaml"):
        with pytest.raises(SystemExit, match="0"):
            main(["train", "-c", name, "--print_config"])
        assert "SyntheticMIMICIV" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --model Fusion --data MIMICIV --lr 1", "unknown option --lr; did you mean --model.learning_rate?"),
        ("train --model Fusion --data MIMICIV --gpus 2", "did you mean --trainer.devices?"),
        ("train --model Fusion --data MIMICIV --epochs 2", "did you mean --trainer.max_epochs?"),
        ("train --model Fusion --data MIMICIV --finetune eicu", "--finetune eicu is not known; did you mean EICU?"),
        (
            "train --model Fusion --data MIMICIV --data.sets b",
            "--data.sets is an option of PhysioNet2012, not of MIMICIV",
        ),
        ("train --model mine.GRU --data MIMICIV", "mine.GRU cannot be imported (No module named 'mine')"),
        ("finetune --ckpt x --finetune_epochs 2", "did you mean --epochs?"),
        ("finetune --ckpt x --trainer.max_epochs 2", "did you mean --epochs?"),
        ("sweep -c sweep_demo --gpus 2", "did you mean --trainer.devices?"),
        ("evaluate --checkpoint x", "did you mean --ckpt?"),
        (
            "train --model Fusion --data MIMICIV --data.sofa.fio2_missing foo",
            "--data.sofa.fio2_missing: expected float",
        ),
        ("--frobnicate", "expected a verb before --frobnicate"),
    ],
)
def test_what_was_meant(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    assert words in capsys.readouterr().err


def test_every_usual_name_leads_somewhere() -> None:
    assert all(options and all(o.startswith("--") for o in options) for options in USUAL.values())
