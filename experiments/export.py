"""``ehr export``: a checkpoint as a file for programs without this package."""

import json
import logging
from pathlib import Path

from ehrmodels import ICUModule, LightGBM, load
from ehrmodels.export import exported, inputs, to_onnx
from ehrmodels.trees import FittedAtOnce
from experiments.files import console, write_text


def export(ckpt: str, out: str, model: type[ICUModule] | None = None) -> None:
    """Write a checkpoint's model as ONNX (.onnx) or torch.export (.pt2), for any number of stays and events.

    Beside it, under the same name and .json, is what its inputs mean: variables in their order with units, centre and scale, static
    features, hours, task and threshold. Inputs are those of the model's view (``datamodules/contract.py``), the output is the
    calibrated probability.

    Args:
        ckpt: Checkpoint, such as runs/NAME/best.ckpt.
        out: File ending in .onnx or .pt2.
        model: Class of the checkpoint's model, where it is your own.
    """
    path = Path(out)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--out {out}: expected a file that ends in .onnx or .pt2")
    network = load(ckpt, model)
    if not network.supervised:
        raise ValueError(f"{ckpt} holds a {type(network).__name__}, which predicts no outcome")
    if isinstance(network, FittedAtOnce) and not (isinstance(network, LightGBM) and path.suffix == ".onnx"):
        raise ValueError(
            f"--out {out}: {type(network).__name__} is no network, and of such only LightGBM can be exported, as .onnx"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        if path.suffix == ".onnx":
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of operators that nobody needs
            to_onnx(network, str(unfinished))
        else:
            import torch

            torch.export.save(exported(network), unfinished)
        unfinished.replace(path)
    except ModuleNotFoundError as error:
        raise ValueError(f"ONNX needs a package that is not installed ({error}): pip install 'ehr[onnx]'") from error
    finally:
        unfinished.unlink(missing_ok=True)
    meaning = {
        "inputs": inputs(network), "threshold": network.threshold, "operating_point": network.operating_point,
        **network.spec._asdict(),
    }  # fmt: skip
    write_text(path.with_suffix(".json"), json.dumps(meaning, indent=1) + "\n")
    console.print(f"wrote {path} and {path.with_suffix('.json').name}", soft_wrap=True)
