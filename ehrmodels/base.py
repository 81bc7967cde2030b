"""The LightningModule that every model inherits: layers made for the data, loss, validation metrics, optimiser, schedule."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, get_args

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from datamodules.contract import Batch, Spec, View, unlabelled
from ehrmodels.calibration import Calibration
from ehrmodels.kinds import KINDS, Kind, threshold
from ehrmodels.step import Compiled, Mode, divided, in_parts

Stage = Literal["train", "val", "test"]
Penalty = Callable[[Batch], Tensor]


class ICUModule(lightning.LightningModule, ABC):
    """Base of all models. A subclass sets ``view``, creates its layers in ``build`` and returns logits from ``forward``.

    Layers depend on the variables of the data, so they are made when a trainer has both: ``Trainer().fit(Fusion(),
    MIMICIV("data"))``. Without a data module, ``initialise`` makes them. What is predicted, its loss and its metrics
    follow from the kind of task (``kinds``). Positives of binary tasks are weighted by N_neg / N_pos of the training
    split; ``predict_step`` takes that weight off the odds again, so probabilities stay calibrated.

    ``forward`` may give a logit of each of several members, in a last axis, while it trains (``layers.Head`` does): the
    loss is then the mean over members.

    Args:
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW; biases and normalisation are exempt.
        warmup: Share of all steps over which the learning rate rises; it falls along a cosine afterwards.
        pos_weight: Weight of a positive sample; default: N_neg / N_pos of the training split.
        average: Decay of the moving average of weights, after every step, that is validated and kept; 0: the weights themselves.
        compile: Let torch.compile make the training steps: "default", or "reduce-overhead" with CUDA graphs, for one GPU.
            Validation and scoring are never compiled, nor is training with a penalty.
    """

    view: View
    summary = False  # whether it reads the statistics of the window beside its view
    supervised = True  # False: learns from the records alone and predicts no outcome
    resumes_within = True  # False: an epoch that was interrupted begins anew

    def __init__(
        self,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        warmup: float = 0.05,
        pos_weight: float | None = None,
        average: float = 0.0,
        compile: Mode | None = None,
    ):
        super().__init__()
        in_range(0, None, learning_rate=learning_rate, weight_decay=weight_decay)
        if not 0 <= average < 1:
            raise ValueError(f"--model.average must be at least 0 and below 1, found {average}")
        in_range(0, 1, warmup=warmup)
        if pos_weight is not None and not 0 < pos_weight < math.inf:
            raise ValueError(f"--model.pos_weight must be a finite number above 0, found {pos_weight}")
        self.save_hyperparameters(logger=False)  # the arguments of the subclass, too
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        if compile not in (None, *get_args(Mode)):
            raise ValueError(f"--model.compile must be one of {', '.join(get_args(Mode))}, found {compile}")
        self.pos_weight, self.average, self.compile_mode = pos_weight, average, compile
        self.compiled: Compiled | None = None  # once training has begun, where ``compile_mode`` asks for it
        self.parts = 1  # in which every batch is computed, where memory is short
        self.spec: Any = None  # a ``Spec`` once there are layers
        self.operating_point = "youden"  # how the threshold is chosen on the validation split: see ``kinds.threshold``
        self.threshold: float | None = None
        self.calibration: Calibration | None = None  # of its probabilities, for another hospital system
        self.penalty: Penalty | None = None  # of what the head reads, added to the loss of training
        self.facts: dict[str, Any] = {}  # what a checkpoint says besides: data, split, patients that were trained on
        self.scores = nn.ModuleDict()
        self.losses = {stage: Mean() for stage in ("train", "val", "test")}  # over the samples of all processes

    @abstractmethod
    def build(self, spec: Spec) -> None:
        """Create the layers for the variables, static features and hours of ``spec``; ``spec.outputs`` logits a sample."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **arguments: Any) -> Self:  # type: ignore[override]
        """The model of a checkpoint, in evaluation mode; nothing in the file is executed.

        Args:
            checkpoint_path: written by ``ehr`` or by any ``lightning.Trainer``.
            arguments: of the model, instead of those in the checkpoint, such as another ``learning_rate``.

        Raises:
            FileNotFoundError, ValueError: as ``ehrmodels.load``.
        """
        from ehrmodels.checkpoint import load

        return load(checkpoint_path, cls, **arguments)  # type: ignore[return-value]

    @property
    def kind(self) -> Kind:
        """The kind of task, once there are layers."""
        return KINDS[self.spec.kind]

    def initialise(self, spec: Spec, pos_weight: float = 1.0) -> None:
        """Make the layers for ``spec``; ``pos_weight`` is used unless the user named one."""
        if spec.kind not in KINDS:
            raise ValueError(f"a task of kind {spec.kind!r} is not known; expected one of {', '.join(KINDS)}")
        self.spec = spec
        if self.pos_weight is None:
            self.pos_weight = pos_weight
        self.build(spec)
        self.scores = nn.ModuleDict({name: make(spec.outputs) for name, make in self.kind.metrics.items()})
        # by name, since a strategy that shards the parameters flattens them
        self.exempt = {n for n, p in self.named_parameters() if p.ndim < 2 or getattr(p, "_no_weight_decay", False)}

    def setup(self, stage: str) -> None:
        """Called by Lightning once the data module is ready: make the layers for its variables, unless there are any.

        Raises:
            ValueError: there is no data module that says which variables there are.
        """
        data = self.trainer.datamodule
        if self.spec is None:
            if getattr(data, "spec", None) is None:
                raise ValueError(
                    f"{type(self).__name__} has no layers yet: give the trainer a data module of `datamodules`, such as "
                    "MIMICIV, or make them with model.initialise(spec)"
                )
            weighted = stage == "fit" and self.supervised and KINDS[data.spec.kind].classes
            self.initialise(data.spec, data.positive_weight() if weighted else 1.0)
        if stage == "fit" and hasattr(data, "facts"):
            self.facts |= data.facts()
        if stage == "fit" and self.compile_mode is not None:
            self._check_compile()

    def _check_compile(self) -> None:
        if type(self).training_step is not ICUModule.training_step:
            raise ValueError(f"--model.compile: {type(self).__name__} is not trained by steps that can be compiled")
        strategy = type(self.trainer.strategy).__name__
        if strategy == "FSDPStrategy":
            raise ValueError("--model.compile does not work with --trainer.strategy fsdp: leave one of them out")
        if self.compile_mode != "reduce-overhead":
            return
        several = self.trainer.world_size > 1 or self.trainer.accumulate_grad_batches > 1
        if several or self.trainer.strategy.root_device.type != "cuda":
            raise ValueError(
                "--model.compile reduce-overhead replays CUDA graphs, whose gradients the next batch overwrites: it "
                "needs one GPU and --trainer.accumulate_grad_batches 1; use --model.compile default"
            )

    # ---- steps ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss, count = self.objective(batch) if self.parts == 1 else in_parts(self, self.objective, batch, self.parts)
        return self._record("train", loss, count, len(batch.row))

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What training makes smaller, and how many values it is the mean of."""
        loss, count, _ = self._loss(batch)
        if self.penalty is not None:
            loss = loss + self.penalty(batch)
        return loss, count

    def validation_step(self, batch: Batch, index: int) -> None:
        self._score("val", batch)

    def test_step(self, batch: Batch, index: int) -> None:
        self._score("test", batch)

    def predict_step(self, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        """Row numbers of the samples (B,) and what is predicted of them, (B,) or (B, K): calibrated probabilities of
        0 or 1, or values."""
        return batch.row, self.prediction(self(batch))

    def prediction(self, output: Tensor) -> Tensor:
        """What ``predict_step`` says of outputs (B,) or (B, K) of ``forward``."""
        predicted = self.kind.prediction(output, self.pos_weight or 1.0)
        return predicted if self.calibration is None else self.calibration(predicted)

    def _score(self, stage: Stage, batch: Batch) -> None:
        loss, _, output = self._loss(batch)
        labelled = ~unlabelled(batch.target)
        output, target = output[labelled], batch.target[labelled]
        self._record(stage, loss, len(target), len(target))
        classes = self.spec.kind != "regression"
        for metric in self.scores.values():
            metric.update(output.sigmoid() if classes else output, target.long() if classes else target)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss of the samples whose target is known, how many those are, and the outputs of all.

        Unknown ones are weighted with 0 instead of being left out, since a GPU would have to be asked how many are left.
        """
        output, labelled = self.outputs(batch).float(), ~unlabelled(batch.target)
        target = batch.target.nan_to_num()
        if output.ndim > target.ndim:  # members
            target = target.unsqueeze(-1).expand_as(output)
        losses = self.kind.loss(output, target, self.pos_weight or 1.0)
        losses = losses.view(len(losses), -1).mean(1)
        count = labelled.sum()
        return (losses * labelled).sum() / count, count, output.detach()

    def outputs(self, batch: Batch) -> Tensor:
        """What ``forward`` gives, compiled in training where that is asked for, in parts otherwise where memory is short."""
        if self.training and self.compile_mode is not None and self.penalty is None:
            self.compiled = self.compiled or Compiled(self.forward, self.compile_mode)
            return self.compiled(batch)
        if self.training or self.parts == 1:
            return self(batch)
        return torch.cat([self(part) for part in divided(batch, self.parts)])

    def _record(self, stage: Stage, loss: Tensor, count: int | Tensor, samples: int) -> Tensor:
        """Count a batch's loss in the mean of the epoch; gives what this process must derive.

        Gradients are averaged over the processes as if each had as many samples. So that they are those of the mean over what
        all processes hold, each loss is weighted by its share.

        Args:
            stage: of which epoch.
            loss: mean over what this process holds of the batch.
            count: how many values it is the mean of.
            samples: how many samples it holds.
        """
        if not is_distributed():
            self.losses[stage].add(loss.detach(), samples)
            return loss
        count = torch.as_tensor(count, dtype=torch.float64, device=loss.device)
        summed, counted, every = all_reduce(
            torch.stack([loss.detach().double() * count, count, count.new_tensor(samples)])
        )
        counted = counted.clamp(min=1)
        self.losses[stage].add((summed / counted).float(), every.long())
        return loss * (count * torch.distributed.get_world_size() / counted).to(loss.dtype)

    # ---- epochs --------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        self.losses["train"] = Mean()

    def on_train_epoch_end(self) -> None:
        self.log("train_loss", self.losses["train"].value(), sync_dist=is_distributed())

    def on_validation_epoch_start(self) -> None:
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        self._begin("test")

    def on_validation_epoch_end(self) -> None:
        self._end("val")

    def on_test_epoch_end(self) -> None:
        self._end("test")

    def _begin(self, stage: Stage) -> None:
        self.losses[stage] = Mean()
        for metric in self.scores.values():
            metric.reset()

    def _end(self, stage: Stage) -> None:
        """Log the loss and the metrics of an epoch, their sum under the name that a run is judged by, and after validation
        choose the threshold."""
        self.log(f"{stage}_loss", self.losses[stage].value(), sync_dist=is_distributed())
        if not self.supervised:
            return
        values = self._ranked(stage) if self.kind.classes else {n: m.compute() for n, m in self.scores.items()}
        if self.kind.monitor:
            values["_".join(self.kind.monitor)] = sum(
                (values[n] for n in self.kind.monitor), torch.zeros_like(values["auroc"])
            )
        self.log_dict({f"{stage}_{name}": value for name, value in values.items()}, sync_dist=is_distributed())
        for metric in self.scores.values():
            metric.reset()

    def _ranked(self, stage: Stage) -> dict[str, Tensor]:
        """AUROC and AUPRC; where there is one class only, no ranking can be judged, and they are those of chance."""
        auroc: Any = self.scores["auroc"]
        positive = sum((t.sum() for t in auroc.target), torch.zeros((), dtype=torch.int64, device=self.device))
        count = torch.as_tensor(sum(len(t) for t in auroc.target), device=self.device)
        positive, count = all_reduce(torch.stack([positive, count]))
        if not 0 < positive < count:  # of all processes: ``compute`` gathers, so all must call it or none
            return {
                "auroc": torch.tensor(0.5, device=self.device),
                "auprc": (positive / count).float().nan_to_num(),
            }
        if stage == "val" and not self.trainer.sanity_checking:
            with auroc.sync_context():
                scored = torch.cat(list(auroc.preds) if isinstance(auroc.preds, list) else [auroc.preds])
                target = torch.cat(list(auroc.target) if isinstance(auroc.target, list) else [auroc.target])
            if torch.isfinite(scored).all():
                self.threshold = threshold(self.prediction(torch.logit(scored.double())), target, self.operating_point)
        return {name: metric.compute() for name, metric in self.scores.items()}  # type: ignore[operator]

    # ---- optimiser -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        named = [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in self.named_parameters() if p.requires_grad]
        exempt, decayed = [p for n, p in named if n in self.exempt], [p for n, p in named if n not in self.exempt]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined] # or Lightning refuses to clip gradients
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                "the learning rate falls to 0 over the training, which needs an end: set --trainer.max_epochs or "
                "--trainer.max_steps"
            )
        total = max(int(steps), 1)
        rise = max(int(self.warmup * total), 1)

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            return 0.5 * (1 + math.cos(math.pi * min((step - rise) / max(total - rise, 1), 1)))

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"},
        }

    def configure_callbacks(self) -> list[Any]:
        """Lightning's own callback averages the weights."""
        if not self.average:
            return []

        def averaged(average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
            decay = min(
                self.average, (1 + float(updates)) / (10 + float(updates))
            )  # the first weights are soon forgotten
            return average + (1 - decay) * (current - average)

        return [_Average(use_buffers=False, avg_fn=averaged)]

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

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        from ehrmodels.checkpoint import entry

        checkpoint["ehr"] = entry(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over variables, scaler and threshold; the data module of the trainer must read the data as they say."""
        from ehrmodels.checkpoint import spec_of

        entry, spec = checkpoint.get("ehr", {}), spec_of(checkpoint)
        if spec != self.spec:
            self.initialise(spec)
        self.pos_weight, self.threshold = entry["pos_weight"], entry.get("threshold")
        self.calibration = Calibration.of(entry.get("calibration"))
        data = self._trainer and self._trainer.datamodule
        if data is not None and hasattr(data, "adopt") and data.spec != spec:
            data.adopt(spec, entry.get("trained_on"))
            data.setup()

    def begin_with(self, path: Path) -> None:
        """Take the weights of a checkpoint of the same layers; those of the head and of the summary only where they are alike.

        Raises:
            ValueError: any other layer is absent there, has another shape, or is not part of this model.
        """
        from ehrmodels.checkpoint import read

        theirs, ours = read(path)["state_dict"], self.state_dict()
        fits = {name: weight for name, weight in theirs.items() if name in ours and weight.shape == ours[name].shape}
        other = ("head.", "summarised.")  # not those of HyMaTEForecast
        wrong = [name for name in {**theirs, **ours} if name not in fits and not name.startswith(other)]
        if wrong:
            shapes = [str(tuple(t[wrong[0]].shape)) if wrong[0] in t else "none" for t in (ours, theirs)]
            raise ValueError(
                f"{path} cannot start this model: {wrong[0]} has the shape {shapes[0]} here and {shapes[1]} there, and {len(wrong) - 1} more "
                "differ; give --model the same class of layers and arguments as the checkpoint's, shown by config.yaml beside it"
            )
        self.load_state_dict(fits, strict=False)


class _Average(WeightAveraging):
    """Lightning's moving average, of a model whose layers are only made when a trainer has its data."""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if getattr(pl_module, "spec", None) is None:
            pl_module.setup(stage)
        super().setup(trainer, pl_module, stage)


class Mean:
    """Running mean over samples, in float32; it does not wait for a GPU."""

    def __init__(self, total: Tensor | float = 0.0, count: Tensor | int = 0):
        self.total, self.count = torch.as_tensor(total), count

    def add(self, value: Tensor, count: Tensor | int) -> None:
        self.total, self.count = self.total.to(value.device) + value * count, self.count + count

    def value(self) -> Tensor:
        return self.total / self.count


def in_range(least: float, most: float | None, **values: float) -> None:
    """Refuse arguments of a model outside a range.

    Raises:
        ValueError: names the flag, what was expected and what was found.
    """
    for name, value in values.items():
        if not math.isfinite(value) or value < least or (most is not None and value > most):
            limits = f"a finite number of at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"--model.{name} must be {limits}, found {value}")


def is_distributed() -> bool:
    """Whether this process trains together with others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, in all of them; changes ``values``."""
    if is_distributed():
        torch.distributed.all_reduce(values)
    return values
