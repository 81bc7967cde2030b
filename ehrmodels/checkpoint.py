"""What a checkpoint holds, and reading one safely: plain types and tensors only, and no code but that of known models.

Besides what Lightning keeps, the entry ``ehr`` holds ``model`` (the class), ``arguments``, ``spec`` (variables, units,
scaler, task), ``pos_weight``, ``threshold``, ``operating_point`` and ``calibration``, and what training said of its data:
``data``, ``split_hash``, ``trained_on``.
"""

import inspect
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from datamodules.contract import Spec
from ehrmodels.calibration import Calibration

if TYPE_CHECKING:
    from ehrmodels.base import ICUModule

NEEDED = ("model", "arguments", "spec", "pos_weight")


def entry(model: "ICUModule") -> dict[str, Any]:
    """The entry ``ehr`` of a model's checkpoint."""
    return {
        **model.facts,
        "model": f"{type(model).__module__}.{type(model).__name__}",
        "arguments": dict(model.hparams),
        "spec": model.spec._asdict(),
        "pos_weight": float(model.pos_weight or 1.0),
        "threshold": model.threshold,
        "operating_point": model.operating_point,
        "calibration": model.calibration and model.calibration.plain(),
    }


def read(path: str | Path, advice: str | None = None) -> dict[str, Any]:
    """A checkpoint as plain types and tensors, checked to be whole and one of ours.

    Args:
        path: the file.
        advice: what to do where it is damaged, for the message.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or was not written by this framework.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: expected a file such as runs/NAME/best.ckpt; set --ckpt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # whatever a damaged archive or pickle leads to
        reason = (str(error) or "the file is empty").splitlines()[0][:200]
        unsafe = isinstance(error, pickle.UnpicklingError)
        other = advice or "use another, such as last.ckpt beside it"
        what = "it holds more than plain types and tensors" if unsafe else reason
        raise ValueError(f"{path}: the checkpoint is damaged or not a checkpoint ({what}); {other}") from error
    end = f"; {advice}" if advice else ""
    if (
        not isinstance(checkpoint, dict)
        or not isinstance(checkpoint.get("ehr"), dict)
        or "state_dict" not in checkpoint
    ):
        raise ValueError(
            f"{path}: not a checkpoint of this framework: expected the entries 'ehr' and 'state_dict'{end}"
        )
    lacking = [name for name in NEEDED if name not in checkpoint["ehr"]]
    if lacking:
        raise ValueError(
            f"{path}: not a checkpoint of this framework: it lacks {', '.join(lacking)} in the entry 'ehr'{end}"
        )
    checkpoint["ehr"].setdefault("trained_on", _trained_on(checkpoint["ehr"]))
    return checkpoint


def spec_of(checkpoint: dict[str, Any], path: str | Path = "the checkpoint") -> Spec:
    """The ``Spec`` of a checkpoint.

    Raises:
        ValueError: there is none, or one of another version.
    """
    content = checkpoint.get("ehr", {}).get("spec")
    needed = set(Spec._fields) - set(Spec._field_defaults)
    if not isinstance(content, dict) or not needed <= set(content) <= set(Spec._fields):
        lacking = sorted(needed - set(content or ()))
        raise ValueError(
            f"{path}: its description of the data is not that of this version (it lacks {', '.join(lacking) or 'nothing'}): "
            f"use the version that it was trained with"
        )
    return Spec(**content)


def load(path: str | Path, model: "type[ICUModule] | None" = None, **arguments: Any) -> "ICUModule":
    """The model of a checkpoint in evaluation mode, built for the variables that it was trained on.

    Args:
        path: the checkpoint.
        model: its class, where that is not one of ``ehrmodels``; a class of yours that was imported is found by its name.
        arguments: of the model, instead of those in the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not ours, of another class, or of another list of variables than its weights.
    """
    checkpoint = read(path)
    content = dict(checkpoint["ehr"])
    kind: Any = _class_of(content["model"], model, path)
    wanted = {**content["arguments"], **arguments}
    unknown = sorted(set(wanted) - _parameters(kind))
    if unknown:
        raise ValueError(
            f"{path}: {kind.__name__} has no argument {', '.join(map(str, unknown))}; was it trained with another version?"
        )
    made = kind(**wanted)
    made.initialise(spec_of(checkpoint, path), content["pos_weight"])
    made.pos_weight, made.threshold = content["pos_weight"], content.get("threshold")
    made.operating_point = content.get("operating_point", "youden")
    made.calibration = Calibration.of(content.get("calibration"))
    made.facts = {k: v for k, v in content.items() if k not in (*NEEDED, "threshold", "operating_point", "calibration")}
    try:
        made.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path}: the weights do not fit the {len(made.spec.variables)} variables that the checkpoint names ({reason})"
        ) from error
    return made.eval()


def _class_of(name: str, model: "type[ICUModule] | None", path: str | Path) -> "type[ICUModule]":
    """The class of a checkpoint among those that are imported already; the file's own words import nothing.

    Raises:
        ValueError: there is none of that name, or the user named another one.
    """
    from ehrmodels.base import ICUModule

    def below(base: type[ICUModule]) -> list[type[ICUModule]]:
        return [kind for derived in base.__subclasses__() for kind in (derived, *below(derived))]

    if model is not None and not inspect.isabstract(model):
        if model.__name__ != str(name).rpartition(".")[2]:
            raise ValueError(f"{path} holds a {name}, not a {model.__module__}.{model.__name__}")
        return model
    classes = {f"{kind.__module__}.{kind.__name__}": kind for kind in below(ICUModule)}  # type: ignore[type-abstract]
    if name not in classes:
        ours = sorted(c for c in classes if c.startswith("ehrmodels."))
        raise ValueError(
            f"{path}: its model {name} is not one of this package ({', '.join(ours)}); if it is yours, name it with "
            f"--model {name} (in Python: load(path, Class))"
        )
    return classes[name]


def _parameters(kind: "type[ICUModule]") -> set[str]:
    """Names of the arguments that a class of models takes, those it hands on to its bases included."""
    from ehrmodels.base import ICUModule

    of_classes = [c for c in kind.__mro__ if "__init__" in vars(c) and issubclass(c, ICUModule)]
    names = {p for c in of_classes for p in inspect.signature(c.__init__).parameters}
    return names - {"self", "args", "kwargs"}


def _trained_on(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Whose patients a model was trained on, where its checkpoint is older than that entry."""
    data = content.get("data")
    if not isinstance(data, dict):
        return []
    arguments = data.get("arguments", {})
    options = {"seed": arguments.get("seed") or 0, "split_by": arguments.get("split_by") or "patient"}
    return [{"population": str(data.get("class")), **options}]
