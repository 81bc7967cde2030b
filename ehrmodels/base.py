"""The LightningModule that every model inherits: loss, validation metrics, optimiser, schedule, what a checkpoint carries."""

import importlib
import math
import pickle
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from datamodules.contract import Batch, Spec, unlabelled


class ICUModule(lightning.LightningModule, ABC):
    """Base of all models. A subclass sets ``view``, creates its layers in ``build`` and returns logits from ``forward``.

    The loss is cross-entropy with positives weighted by N_neg / N_pos of the training split. That weight multiplies the
    odds which the network learns, so its logarithm is taken off every logit again: probabilities stay calibrated.

    Args:
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW; biases and normalisation are exempt.
        warmup: Share of all steps over which the learning rate rises; it falls along a cosine afterwards.
        pos_weight: Weight of a positive sample; default: N_neg / N_pos of the training split.
    """

    view: Literal["grid", "triplets"]
    supervised = True  # False: learns from the records alone and predicts no outcome

    def __init__(self, learning_rate: float, weight_decay: float, warmup: float, pos_weight: float | None):
        super().__init__()
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay), ("warmup", warmup)):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"--model.{name} must be a finite number of at least 0, found {value}")
        self.learning_rate, self.weight_decay, self.warmup, self.pos_weight = (
            learning_rate,
            weight_decay,
            warmup,
            pos_weight,
        )
        self.facts: dict[str, Any] = {}  # what ``experiments`` wants every checkpoint to carry: data, split, threshold
        self.auroc, self.auprc = BinaryAUROC(), BinaryAveragePrecision()
        self.losses = {"train": Mean(), "val": Mean()}  # of the epoch, over the samples of all processes

    @abstractmethod
    def build(self, spec: Spec) -> None:
        """Create the layers for the variables, static features and hours of ``spec``."""

    def start(self, spec: Spec, pos_weight: float) -> None:
        """Build for ``spec``; ``pos_weight`` is used unless the user named one."""
        self.spec = spec
        if self.pos_weight is None:
            self.pos_weight = pos_weight
        self.build(spec)
        # by name, since a strategy that shards the parameters flattens them
        self.exempt = {n for n, p in self.named_parameters() if p.ndim < 2 or getattr(p, "_no_weight_decay", False)}

    def begin_with(self, path: Path) -> None:
        """Take the weights of a checkpoint of the same layers; those of the head only where it has the same shape.

        Raises:
            ValueError: any other layer is absent there, has another shape, or has no place here.
        """
        given, mine = read_checkpoint(path)["state_dict"], self.state_dict()
        fits = {name: weight for name, weight in given.items() if name in mine and weight.shape == mine[name].shape}
        wrong = [name for name in {**given, **mine} if name not in fits and not name.startswith("head.")]
        if wrong:
            shapes = [str(tuple(t[wrong[0]].shape)) if wrong[0] in t else "none" for t in (mine, given)]
            raise ValueError(
                f"{path} cannot start this model: {wrong[0]} has the shape {shapes[0]} here and {shapes[1]} there, and {len(wrong) - 1} more "
                "differ; give --model the same class of layers and arguments as the checkpoint's, shown by config.yaml beside it"
            )
        self.load_state_dict(fits, strict=False)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss, logit, _ = self._loss(batch)
        return self._record("train", loss, len(logit), len(batch.target))

    def validation_step(self, batch: Batch, index: int) -> None:
        loss, logit, target = self._loss(batch)
        self._record("val", loss, len(target), len(target))
        self.auroc.update(logit.sigmoid(), target.long())
        self.auprc.update(logit.sigmoid(), target.long())

    def _record(self, stage: Literal["train", "val"], loss: Tensor, count: int | Tensor, samples: int) -> Tensor:
        """Count a batch's loss in the mean of the epoch; gives what this process must derive.

        Gradients are averaged over the processes as if each had as many samples. So that they are those of the mean over what
        all processes hold, each loss is weighted by its share.

        Args:
            stage: of which epoch.
            loss: mean over what this process holds of the batch.
            count: how many values it is the mean of.
            samples: how many samples it holds.
        """
        if not several():
            self.losses[stage].add(loss.detach(), samples)
            return loss
        count = torch.as_tensor(count, dtype=torch.float64, device=loss.device)
        summed, counted, every = add_up(torch.stack([loss.detach().double() * count, count, count.new_tensor(samples)]))
        counted = counted.clamp(min=1)
        self.losses[stage].add((summed / counted).float(), int(every))
        return loss * (count * torch.distributed.get_world_size() / counted).to(loss.dtype)

    def on_train_epoch_start(self) -> None:
        self.losses["train"] = Mean()

    def on_train_epoch_end(self) -> None:
        self.log("train_loss", self.losses["train"].value(), sync_dist=several())

    def on_validation_epoch_start(self) -> None:
        self.losses["val"] = Mean()

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", self.losses["val"].value(), sync_dist=several())
        if not self.supervised:
            return
        positive = sum((t.sum() for t in self.auroc.target), torch.zeros((), dtype=torch.int64, device=self.device))
        count = torch.as_tensor(sum(len(t) for t in self.auroc.target), device=self.device)
        positive, count = add_up(torch.stack([positive, count]))
        both = bool(
            (positive > 0) & (positive < count)
        )  # of all processes: ``compute`` gathers, so all must call it or none
        auroc = self.auroc.compute() if both else torch.tensor(0.5)  # one class only: no ranking to judge
        auprc = self.auprc.compute() if both else (positive / count).float().nan_to_num()
        self.log_dict({"val_auroc": auroc, "val_auprc": auprc, "val_auroc_auprc": auroc + auprc}, sync_dist=several())
        self.auroc.reset()
        self.auprc.reset()

    def predict_step(self, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        """Row numbers of the samples and their calibrated probabilities, each (B,)."""
        return batch.row, self.probability(self(batch))

    def probability(self, logit: Tensor) -> Tensor:
        """Calibrated probabilities of logits: without the weight that positives had in training."""
        return torch.sigmoid(logit.double() - math.log(self.pos_weight or 1.0))

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logit = self(batch)
        known = ~unlabelled(batch.target)
        logit, target = logit[known].float(), batch.target[known]
        weight = torch.tensor(self.pos_weight or 1.0, device=logit.device)
        return nn.functional.binary_cross_entropy_with_logits(logit, target, pos_weight=weight), logit.detach(), target

    def configure_optimizers(self) -> Any:
        named = [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in self.named_parameters() if p.requires_grad]
        exempt, decayed = [p for n, p in named if n in self.exempt], [p for n, p in named if n not in self.exempt]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        rise = max(int(self.warmup * total), 1)

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            return 0.5 * (1 + math.cos(math.pi * min((step - rise) / max(total - rise, 1), 1)))

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        whole = self.trainer.strategy.model
        if hasattr(whole, "clip_grad_norm_") and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            whole.clip_grad_norm_(gradient_clip_val)  # parameters are sharded: no process knows the norm by itself
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ehr"] = {
            "model": f"{type(self).__module__}.{type(self).__name__}",
            "arguments": dict(self.hparams),
            "spec": self.spec._asdict(),
            "pos_weight": float(self.pos_weight or 1.0),
            **self.facts,
        }


class Mean:
    """Running mean over samples; plain numbers of float32, so that a checkpoint can carry it."""

    def __init__(self, total: Tensor | float = 0.0, count: int = 0):
        self.total, self.count = torch.as_tensor(total), count

    def add(self, value: Tensor, count: int) -> None:
        self.total, self.count = self.total.to(value.device) + value * count, self.count + count

    def value(self) -> Tensor:
        return self.total / self.count


def several() -> bool:
    """Whether this process trains together with others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def add_up(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, in all of them; changes ``values``."""
    if several():
        torch.distributed.all_reduce(values)
    return values


def read_checkpoint(path: Path, advice: str | None = None) -> dict[str, Any]:
    """A checkpoint as plain types and tensors, checked to be one of ours; ``advice`` says what to do where it is not.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or was not written by this framework.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: expected a file such as runs/NAME/best.ckpt; set --ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError) as error:
        said = (str(error) or "the file is empty").splitlines()[0][:200]
        other = advice or "use another, such as last.ckpt beside it"
        raise ValueError(f"{path}: the checkpoint is damaged or not a checkpoint ({said}); {other}") from error
    end = f"; {advice}" if advice else ""
    if not isinstance(checkpoint, dict) or "ehr" not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(
            f"{path}: not a checkpoint of this framework: expected the entries 'ehr' and 'state_dict'{end}"
        )
    lacking = [entry for entry in ("model", "arguments", "spec", "pos_weight") if entry not in checkpoint["ehr"]]
    if lacking:
        raise ValueError(
            f"{path}: not a checkpoint of this framework: it lacks {', '.join(lacking)} in the entry 'ehr'{end}"
        )
    return checkpoint


def load(path: Path) -> ICUModule:
    """The model of a checkpoint, built for the variables that it was trained on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not ours, or of another list of variables than its weights.
    """
    checkpoint = read_checkpoint(path)
    facts = dict(checkpoint["ehr"])
    where, _, name = facts.pop("model").rpartition(".")
    if not re.fullmatch(r"ehrmodels\.\w+", where):
        raise ValueError(f"{path}: model {where}.{name} is not one of this package; expected ehrmodels.<file>.<Class>")
    try:
        model = getattr(importlib.import_module(where), name)(**facts.pop("arguments"))
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: cannot make the model {where}.{name} ({error}); was it trained with another version?"
        ) from error
    spec = Spec(**facts.pop("spec"))
    model.start(spec, facts.pop("pos_weight"))
    model.facts = facts
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path}: the weights do not fit the {len(spec.variables)} variables that the checkpoint names ({said})"
        ) from error
    return model.eval()
