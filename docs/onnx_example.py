"""Risks from what `ehr export` writes, with onnxruntime and numpy alone.

    python onnx_example.py MODEL.onnx STAYS.csv EVENTS.csv

Tables are those of `ehr prepare --out` as CSV: stay_id, age and so on; stay_id, minute, known_minute, concept, value.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def inputs(say: dict[str, Any], stay: dict[str, str], events: list[dict[str, str]]) -> dict[str, np.ndarray]:
    """All that models read of one stay; the JSON beside the model, ``say``, tells what each of them is."""
    at, hours, carry, clip = (say[n] for n in ("prediction_minute", "window_hours", "carry_hours", "clip"))
    known = [e for e in events if int(e["minute"]) < at and int(e["known_minute"] or e["minute"]) < at]
    static = [standard(raw(stay, feature), feature, clip) for feature in say["statics"]]
    value, mask, since = np.zeros((3, hours, len(say["variables"])))
    summary, triplets = [], []
    for k, variable in enumerate(say["variables"]):
        own = [e for e in known if e["concept"] == variable["name"]]
        course = [(int(e["minute"]) - at + 60 * hours, float(np.float32(e["value"]))) for e in own]
        course.sort(key=lambda event: event[0])  # of one minute in the order of the table
        minute, x = np.array(course).reshape(-1, 2).T  # since the window opened
        recent = minute >= -60 * carry
        hour = (minute[recent] // 60).astype(int) + carry
        count = np.bincount(hour, minlength=carry + hours)
        level = np.bincount(hour, x[recent], carry + hours)
        if variable["hourly"] == "mean":
            level = level / np.maximum(count, 1)
        last = np.maximum.accumulate(np.where(count > 0, np.arange(carry + hours), -1))[carry:]  # hour that was charted
        mask[:, k] = count[carry:] > 0
        since[:, k] = np.where(last < 0, 1, np.minimum((np.arange(carry, carry + hours) - last) / hours, 1))
        value[:, k] = np.where(last < 0, 0, standard(level[last], variable, clip))
        if variable["hourly"] == "rate":
            steps = np.zeros(60 * hours)
            for start, rate in course:
                steps[max(int(start), 0) :] = rate
            value[:, k] = standard(steps.reshape(hours, 60).mean(1), variable, clip)
            place = int((minute < 0).sum())
            if place and x[place - 1] and 0 not in minute:  # it runs when the window opens
                minute, x, recent = (
                    np.insert(minute, place, 0),
                    np.insert(x, place, x[place - 1]),
                    np.insert(recent, place, 1),
                )
        told = statistics(minute[recent], x[recent], hours)
        summary.append([told[statistic["name"]] for statistic in say["statistics"]])
        triplets += [(m, k, v) for m, v in zip(minute, standard(x, variable, clip), strict=True) if m >= 0]
    triplets.sort(key=lambda event: event[:2])
    time, position, number = np.array(triplets or [(30 * hours, -1, 0)]).T
    tensors = {"static": static, "summary": summary, "value": value, "mask": mask, "since": since}
    if say["view"] == "triplets":
        tensors |= {"time": 2 * time / (60 * hours) - 1, "value": number}
    numbers = {"variable": position[None].astype(np.int64) + 1, "length": np.array([len(triplets)])}
    return numbers | {name: np.array([tensor], np.float32) for name, tensor in tensors.items()}


def raw(stay: dict[str, str], feature: dict[str, Any]) -> float:
    """A static feature in its unit."""
    if "column" not in feature:
        raise SystemExit(f"this example does not compute {feature['name']}: {feature['definition']}")
    text = stay[feature["column"]]
    return float(text == feature["equals"]) if "equals" in feature else float(text or "nan")


def standard(number: Any, of: dict[str, Any], clip: float) -> Any:
    """Standardised in 32 bits, since models tell a value from the next one at the edges of their bins; unknown is 0."""
    center, scale = np.float32(of["center"]), np.float32(of["scale"])
    return np.nan_to_num(np.clip((np.asarray(number, np.float32) - center) / scale, -clip, clip))


def statistics(minute: np.ndarray, x: np.ndarray, hours: int) -> dict[str, float]:
    """Of the observations of a variable in order of time, the carried ones (before minute 0) first."""

    def of(values: np.ndarray, number: Any) -> float:
        return number(values) if len(values) else np.nan

    inside, late, latest = x[minute >= 0], x[minute >= 30 * hours], of(minute, np.max) / 60
    return {
        "number": len(inside),
        "first": of(inside, lambda values: values[0]),
        "last": of(x, lambda values: values[-1]),
        "change": of(inside, lambda values: values[-1] - values[0]),
        "minimum": of(inside, np.min),
        "maximum": of(inside, np.max),
        "mean": of(inside, np.mean),
        "median": of(inside, np.median),
        "sd": of(inside, np.std),
        "sum": of(inside, np.sum),
        "hours_since": hours - latest,
        "hour_of_last": latest,
        "late_mean": of(late, np.mean),
        "late_minimum": of(late, np.min),
        "late_maximum": of(late, np.max),
        "late_sum": of(late, np.sum),
    }


def main(model: str, stays: str, events: str) -> None:
    say = json.loads(Path(model).with_suffix(".json").read_text())
    session = onnxruntime.InferenceSession(model)
    charted: dict[str, list[dict[str, str]]] = {}
    with Path(events).open(newline="") as file:
        for row in csv.DictReader(file):
            charted.setdefault(row["stay_id"], []).append(row)
    with Path(stays).open(newline="") as file:
        for stay in csv.DictReader(file):
            tensors = inputs(say, stay, charted.get(stay["stay_id"], []))
            (risk,) = session.run(None, {tensor.name: tensors[tensor.name] for tensor in session.get_inputs()})
            print(stay["stay_id"], f"{risk[0]:.6f}", sep=",")


if __name__ == "__main__":
    main(*sys.argv[1:])
