"""A callback that learns the proportions of sources of data during a training with `transformers.Trainer`.

It needs the extra `lm`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bilevel import checks, randomness
from bilevel.errors import NonFiniteError
from bilevel.integrations.mixed_sources import MixedSources

__all__ = ["MixedSources", "MixtureCallback"]

_LABELS = ("label", "label_ids", "labels")
_PREFIX = "mixture/"


class MixtureCallback(TrainerCallback):
    """Update the proportions of a `MixedSources` every few steps of an ordinary training, by first-order products.

    With the gradient g_s of the loss on a batch of source s and the gradient g of the loss on a batch of the target,
    both at the current parameters, the proportions become

        p_s ← p_s exp(rate · ⟨g_s, g⟩ / (‖g‖ max_r ‖g_r‖)), divided by their sum.

    ⟨g_s, g⟩ is, up to the learning rate, how much one step of gradient descent on source s lowers the loss of the
    target; the update is exponentiated gradient descent on it. No second derivative is taken, so fused attention,
    activation checkpointing, mixed precision and gradient accumulation work as in the training itself. The derivative
    looks one step ahead only: early in a training it favours what is learnt fast. `bilevel run mixture` has exact
    gradients through many steps for small models.

    The proportions are written to the trainer's log as `mixture/NAME` after each update, and a resumed training goes on
    from the last ones in the log.

    Args:
        trainer: a trainer whose `train_dataset` is a `MixedSources`. Its `eval_dataset` is the target. TRL's
            `SFTTrainer` is such a trainer; pass tokenised sources and
            `SFTConfig(dataset_kwargs={"skip_prepare_dataset": True})`, so that it leaves the dataset as it is.
        every: the number of optimiser steps between two updates.
        rate: the step size of an update. A proportion changes by at most the factor e^(2·rate).
        batch_size: the number of examples of the target and of each source in an update; by default the trainer's
            batch size on a device.
        target: a dataset to be used in place of the trainer's `eval_dataset`.
        warmup: the number of optimiser steps before the first update.
        seed: of the examples in the updates.

    Raises:
        TypeError, ValueError: the trainer has no `MixedSources` or no target, or is sharded.
        NonFiniteError: raised during the training if a gradient is NaN or infinite.

    Cost: S + 1 gradients in each update, for S sources. Memory: two gradients.

    >>> from transformers import Trainer, TrainingArguments
    >>> from bilevel.integrations.transformers import MixedSources, MixtureCallback
    >>> trainer = Trainer(
    ...     model=torch.nn.Linear(1, 1),
    ...     args=TrainingArguments(max_steps=100, report_to=[], use_cpu=True),
    ...     train_dataset=MixedSources({"web": [{"x": 1.0}], "books": [{"x": 2.0}]}),
    ...     eval_dataset=[{"x": 2.0}],
    ... )
    >>> trainer.add_callback(MixtureCallback(trainer, every=20))
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int = 50,
        rate: float = 0.3,
        batch_size: int | None = None,
        target: Any = None,
        warmup: int = 0,
        seed: int = 0,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"trainer is a {type(trainer).__name__}; build a transformers.Trainer first, then "
                "trainer.add_callback(MixtureCallback(trainer))"
            )
        if not isinstance(trainer.train_dataset, MixedSources):
            raise TypeError(
                f"the trainer's train_dataset is a {type(trainer.train_dataset).__name__}, whose proportions cannot be "
                'changed; pass train_dataset=MixedSources({"web": web_dataset, "books": books_dataset})'
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "the trainer shards the parameters (FSDP or DeepSpeed), and a product of two sharded gradients is not "
                "supported; train on one device or with data parallelism"
            )
        checks.whole_number(every, "every")
        checks.positive(rate, "rate")
        checks.whole_number(warmup, "warmup", at_least=0)
        randomness.check_seed(seed)
        self.trainer = trainer
        self.sources = trainer.train_dataset
        self.every, self.rate, self.warmup, self.seed = every, rate, warmup, seed
        self.target = _target_of(trainer, target)
        self.batch_size = trainer.args.per_device_train_batch_size if batch_size is None else batch_size
        checks.whole_number(self.batch_size, "batch_size")

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Go on from the last proportions in the log, if the training is resumed."""
        if state.global_step == 0:
            return
        names = {_PREFIX + name: name for name in self.sources.names}
        for row in reversed(state.log_history):
            if names.keys() <= row.keys():
                self.sources.proportions = {name: row[key] for key, name in names.items()}
                return

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Update the proportions after every `every` steps of the optimiser."""
        if state.global_step % self.every or state.global_step <= self.warmup:
            return
        old = torch.tensor([self.sources.proportions[name] for name in self.sources.names], dtype=torch.float64)
        alignment = self.alignment(state.global_step)
        shifted = self.rate * (alignment - alignment.max())  # a common term changes nothing
        new = old * shifted.exp()
        self.sources.proportions = dict(zip(self.sources.names, (new / new.sum()).tolist(), strict=True))
        logs_loss = control.should_log  # `log` takes this back, and the trainer's own row would be missing
        self.trainer.log({_PREFIX + name: share for name, share in self.sources.proportions.items()})
        control.should_log = logs_loss

    def alignment(self, counter: int) -> Tensor:
        """Return ⟨g_s, g⟩ / (‖g‖ max_r ‖g_r‖) for each source `[S]`, on batches that depend on the seed and a counter.

        The parameters, their gradients and the random number generators are left as they were.
        """
        kept = [parameter.grad for parameter in self._parameters()]
        try:
            drawn = randomness.generator(self.seed, randomness.TARGET_EXAMPLES, counter)
            numbers = drawn.integers(0, len(self.target), self.batch_size)
            of_target = self._gradient(self.target, numbers.tolist(), counter, "the target")
            products, norms = [], []
            for name in self.sources.names:
                numbers = self.sources.example_numbers(name, self.batch_size, counter)
                found = self._gradient(self.sources.sources[name], numbers, counter, f"the source {name!r}")
                products.append(_product(found, of_target))
                norms.append(_product(found, found) ** 0.5)
        finally:
            for parameter, gradient in zip(self._parameters(), kept, strict=True):
                parameter.grad = gradient
        scale = _product(of_target, of_target) ** 0.5 * max(norms)
        return torch.tensor([product / scale if scale > 0 else 0.0 for product in products], dtype=torch.float64)

    def _parameters(self) -> list[torch.nn.Parameter]:
        model: Any = self.trainer.model
        return [p for p in model.parameters() if p.requires_grad]

    def _gradient(self, data: Any, numbers: Sequence[int], counter: int, what: str) -> list[Tensor | None]:
        """Return the gradient of the trainer's loss on some examples, with the trainer's precision."""
        trainer: Any = self.trainer
        model = trainer.model
        for parameter in self._parameters():
            parameter.grad = None
        examples = [_for_model(data[i], trainer) for i in numbers]
        inputs: Any = send_to_device(trainer.data_collator(examples), trainer.accelerator.device)
        with randomness.torch_seeded(self.seed, randomness.ALIGNMENT, counter), torch.enable_grad():
            with trainer.compute_loss_context_manager():
                loss: Any = trainer.compute_loss(model, inputs)
            loss.backward()
        gradient = [parameter.grad for parameter in self._parameters()]
        if not loss.isfinite() or not all(g is None or g.isfinite().all() for g in gradient):
            raise NonFiniteError(
                f"the loss or its gradient on a batch of {what} is NaN or infinite at step {counter}; look at that "
                "data, or lower the learning rate"
            )
        return gradient


def _target_of(trainer: Trainer, target: Any) -> Any:
    data: Any = trainer.eval_dataset if target is None else target
    if data is None:
        raise ValueError(
            "the trainer has no eval_dataset, and the proportions are chosen for a target; pass "
            "Trainer(eval_dataset=...) or MixtureCallback(trainer, target=...)"
        )
    if isinstance(data, dict):
        raise ValueError(
            f"the trainer's eval_dataset is a dict with {', '.join(map(repr, data))}; name the target: "
            f"MixtureCallback(trainer, target=eval_dataset[{next(iter(data), 'name')!r}])"
        )
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            f"the target is a {type(data).__name__} without a length and random access; pass a list or a map-style "
            "dataset"
        )
    if len(data) == 0:
        raise ValueError("the target is empty; at least one example is needed")
    return data


def _for_model(example: Any, trainer: Trainer) -> Any:
    """Return an example without the columns that the trainer would remove."""
    if not trainer.args.remove_unused_columns or not isinstance(example, dict):
        return example
    model: Any = trainer.model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = {*inspect.signature(model.forward).parameters, *_LABELS, *(trainer.label_names or ())}
    return {name: value for name, value in example.items() if name in known}


def _product(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    """Return the inner product of two gradients in float32; a missing part counts as zero."""
    parts = [
        torch.dot(a.detach().flatten().float(), b.detach().flatten().float())
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    ]
    return float(torch.stack(parts).sum()) if parts else 0.0
