"""``ehr train --teacher``: boosted trees that soften the labels of a network, none of which they have seen themselves.

A tenth of what training aims at is the outcome, the rest the probability that trees give to the very copy of the stay that
the network sees, with the observations that were left out of it (nine tenths served better than half in a
cross-validation inside the training split of PhysioNet 2012). The trees are cross-fitted: patients of the training split
are divided into five parts, and those of a part are labelled by trees that were grown on the other four.

Reference: Hinton, Vinyals, Dean 2015, arXiv:1503.02531 (soft targets); what is cross-fitted is ours.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.build import once
from datamodules.cohort import hashed
from datamodules.module import ICUDataModule
from ehrmodels import LightGBM
from ehrmodels.checkpoint import read
from ehrmodels.trees import Rows, features_of
from experiments.files import console

FOLDS = 5
SHARE = 0.9  # of the teacher in what training aims at


class CrossFitted:
    """Trees of each part of the training split; see ``datamodules.module.Teacher``.

    Args:
        trees: one model for each part, fitted to the others.
        part: (N,) of each sample; -1 where it is not in the training split.
    """

    def __init__(self, trees: list[LightGBM], part: np.ndarray):
        self.trees, self.part = trees, part

    def mixed(self, target: np.ndarray, rows: np.ndarray, static: np.ndarray, summary: np.ndarray) -> np.ndarray:
        """(B,) outcome and probability, mixed, of samples of the training split; an unknown outcome stays unknown."""
        part, soft = self.part[rows], np.array(target, np.float64)
        assert (part >= 0).all(), "a teacher labels the training split only"
        features = features_of(torch.from_numpy(static), torch.from_numpy(summary)).numpy()
        for k, trees in enumerate(self.trees):
            if (mine := part == k).any():
                soft[mine] = 1 / (1 + np.exp(-trees.output(features[mine])))
        return ((1 - SHARE) * target + SHARE * soft).astype(np.float32)


def teacher(name: str, data: ICUDataModule) -> CrossFitted:
    """The cross-fitted teacher of ``data``, which is set up; kept in the cache beside the store.

    Args:
        name: ``lightgbm``, or the checkpoint or run directory of a LightGBM whose settings are used (not its trees, which
            have seen everyone).
        data: hospital system.

    Raises:
        ValueError: the task is not of 0 or 1, the run is of another model, or lightgbm is not installed.
        FileNotFoundError: there is no such run.
    """
    assert data.spec is not None
    if data.spec.kind not in ("binary", "hourly_binary"):
        raise ValueError(
            f"--teacher knows tasks with outcomes of 0 or 1; {data.spec.task['name']} is none: leave it out"
        )
    arguments = {} if name == "lightgbm" else _settings(name)
    rows = data.rows("train")
    part = np.full(len(data.samples), -1)
    part[rows] = [_part(patient) for patient in data.samples["patient_id"].gather(rows)]
    facts = {
        "spec": data.spec._asdict(),
        "split": data.split_hash(),
        "arguments": arguments,
        "rows": len(rows),
        "folds": FOLDS,
    }
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()
    folder = data.store.folder / "teachers" / key
    trees = [LightGBM(**arguments) for _ in range(FOLDS)]
    for model in trees:
        model.initialise(data.spec)

    def fit(partial: Path) -> None:
        features, target = _training(data, rows)
        for k, model in enumerate(trees):
            console.print(f"teacher: trees for part {k + 1} of {FOLDS} of the training split", soft_wrap=True)
            others = (part[rows] != k) & ~np.isnan(target)
            (partial / f"{k}.txt").write_text(model.fit_rows((features[others], target[others])))

    once(folder, fit)  # also where several processes train together, or beside each other
    for k, model in enumerate(trees):
        model.fitted = (folder / f"{k}.txt").read_text()
    return CrossFitted(trees, part)


def _settings(name: str) -> dict[str, Any]:
    path = Path(name)
    content = read(path / "best.ckpt" if path.is_dir() else path)["ehr"]
    if not str(content["model"]).endswith(".LightGBM"):
        raise ValueError(f"--teacher {name} holds a {content['model']}: expected lightgbm, or a run of LightGBM")
    return dict(content["arguments"])


def _part(patient: Any) -> int:
    """Part of a patient: the same in every run."""
    return hashed(f"teacher {patient}") % FOLDS


def _training(data: ICUDataModule, rows: np.ndarray) -> Rows:
    """Features and outcomes of samples, with all of their observations."""
    pieces = np.array_split(rows, max(len(rows) // 512, 1))
    batches = [data.batch(piece, view="summary") for piece in pieces]
    features = torch.cat([features_of(b.static, b.summary) for b in batches])
    return features.numpy(), torch.cat([b.target for b in batches]).numpy()
