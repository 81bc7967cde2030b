"""``ehr export``: a checkpoint as a file for programs without this package."""

import json
import logging
from pathlib import Path
from typing import Any

from datamodules.contract import Spec
from datamodules.dictionary import BY_NAME
from datamodules.scaler import HOURS, NUMBER, PER_HOUR
from datamodules.scores import MEANING as SCORES
from datamodules.summary import MEANING
from datamodules.views import CARRY, CLIP
from ehrmodels import ICUModule, load
from ehrmodels.export import exported, inputs, to_onnx
from ehrmodels.trees import Boosted
from experiments.files import console, write_text

HOUR = "(samples, window_hours, variables)"
VIEWS_MEAN: dict[str, dict[str, str]] = {
    "grid": {
        "value": f"{HOUR} of each hour as `hourly` says, standardised; where nothing was charted, that of the last hour before in which it was, "
        "0 where there is none",
        "mask": f"{HOUR} 1 where charted in that hour, else 0",
        "since": f"{HOUR} hours since the last hour in which it was charted, divided by window_hours, at most 1; 1 where there is none",
    },
    "triplets": {
        "time": "(samples, events) of the window in order of time, then variable, then value: 2 minute / (60 window_hours) - 1, of minutes "
        "since the window opened; padded with 0 on the right to the longest sample, and to 1 at least",
        "variable": "(samples, events) position among `variables`, from 1; 0 is padding",
        "value": "(samples, events) standardised; padded with 0",
        "length": "(samples,) how many are no padding",
    },
    "summary": {},
}


def export(ckpt: str, out: str, model: type[ICUModule] | None = None) -> None:
    """Write a checkpoint's model as ONNX (.onnx) or torch.export (.pt2), for any number of stays and events.

    Beside it, under the same name and .json, is all that it takes to make its inputs from events: variables in their order with units,
    ranges, centre and scale, static features, statistics, hours, task, threshold. docs/onnx_example.py scores stays with nothing else.
    The output is the calibrated probability.

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
    if isinstance(network, Boosted) and path.suffix != ".onnx":
        raise ValueError(f"--out {out}: {type(network).__name__} is no network: its trees can be exported as .onnx")
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
    write_text(path.with_suffix(".json"), json.dumps(meaning(network), indent=1) + "\n")
    console.print(f"wrote {path} and {path.with_suffix('.json').name}", soft_wrap=True)


def meaning(network: ICUModule) -> dict[str, Any]:
    """All that a program needs to make a model's inputs from events, in plain types; ``docs/onnx_example.py`` does it."""
    spec: Spec = network.spec
    whole, carried = f"{spec.window} hours before the prediction", f"{CARRY} hours before them"
    view = VIEWS_MEAN[network.view]
    summary = "(samples, variables, statistics) as `statistics` defines them, in units and not standardised; NaN where there is nothing to tell"
    says = {"static": "(samples, statics) standardised", "summary": summary, **view}
    variables = [
        {"name": name, "unit": unit, "range": [BY_NAME[name].low, BY_NAME[name].high], "hourly": BY_NAME[name].hourly, "center": center, "scale": scale}
        for name, unit, center, scale in zip(spec.variables, spec.units, spec.center, spec.scale, strict=True)
    ]  # fmt: skip
    statics = [
        {"name": name, **_static(name), "center": center, "scale": scale}
        for name, center, scale in zip(spec.statics, spec.static_center, spec.static_scale, strict=True)
    ]
    calibration = network.calibration
    return {
        "model": type(network).__name__, "view": network.view, "inputs": {name: says[name] for name in inputs(network)},
        "output": "(samples,) the probability of the outcome, recalibrated where the model is; (samples, labels) of several labels",
        "task": spec.task, "threshold": network.threshold, "operating_point": network.operating_point,
        "calibration": None if calibration is None else calibration.plain(),  # which the file has applied
        "prediction_minute": 60 * spec.task["hours"], "window_hours": spec.window, "carry_hours": CARRY, "clip": CLIP,
        "events": f"The window is the {whole}. Of its events, and of those of the {carried}, which are carried into it, those count that lie "
        "before the prediction and were known before it. Values are in `unit`; one outside `range` is left out, or clipped where `hourly` is rate. "
        "What is derived from others (norepinephrine_equivalent, norepinephrine_equivalent_change, urine_rate, gcs) is among the events of "
        "`ehr prepare --out`.",
        "hourly": {
            "mean": "the mean of the values of an hour", "sum": "their sum",
            "rate": "the mean over the minutes of an hour of a step function: a value holds until the next one, however long ago it was set, "
            "and 0 does before the first; what runs when the window opens is an event of its first minute, unless it is set anew then",
        },
        "standardised": "(value - center) / scale, clipped to -clip .. clip; a static feature that is not known is 0",
        "variables": variables, "statics": statics, "statistics": [{"name": n, "definition": text} for n, text in MEANING.items()],
    }  # fmt: skip


def _static(name: str) -> dict[str, str]:
    """Where a static feature comes from: a column of the stays, or its definition."""
    if name == HOURS:
        return {"definition": "hours from ICU admission to the prediction"}
    for prefix, text in ((PER_HOUR, "its {} per hour since ICU admission, of at least one hour"), (NUMBER, "{}")):
        if name.startswith(prefix):
            number = text.format("number of observations since the record began")
            return {"definition": f"log(1 + n), n of {name.removeprefix(prefix)}: {number}"}
    if name in SCORES:
        return {"definition": f"of the last values, window or carried: {SCORES[name]}; unknown where it cannot be told"}
    column, _, value = name.partition("=")
    return {"column": column, "equals": value} if value else {"column": column}
