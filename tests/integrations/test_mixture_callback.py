"""MixtureCallback: its products against a plain loop, what it leaves unchanged, what it learns, and its errors."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from bilevel.errors import NonFiniteError
from bilevel.integrations.transformers import MixedSources, MixtureCallback

LENGTH = 6


def sequences(tokens: range, count: int, seed: int) -> list[dict[str, Any]]:
    """Sequences of a token repeated, from a few of the tokens; with a column that the model does not take."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(tokens.start, tokens.stop, (count,), generator=generator).tolist()
    return [{"input_ids": [t] * LENGTH, "labels": [t] * LENGTH, "words": "unused"} for t in drawn]


def a_trainer(tmp_path: Path, steps: int = 6, dropout: float = 0.0, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=12, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **settings,
    )
    sources = MixedSources({"useful": sequences(range(1, 4), 40, 1), "useless": sequences(range(6, 12), 40, 2)})
    return Trainer(GPT2LMHeadModel(config), args, train_dataset=sources, eval_dataset=sequences(range(1, 4), 30, 3))


# -- the products ------------------------------------------------------------------------------------------------------


def test_the_alignment_is_that_of_plain_gradients(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path)
    callback = MixtureCallback(trainer, batch_size=30)
    callback.target = trainer.eval_dataset[:1] * 30  # any choice of examples is the same batch
    for name in callback.sources.names:
        callback.sources.sources[name] = callback.sources.sources[name][:1] * 30

    def gradient(example: dict[str, Any]) -> torch.Tensor:
        ids = torch.tensor([example["input_ids"]])
        logits = trainer.model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        parts = torch.autograd.grad(loss, [*trainer.model.parameters()])
        return torch.cat([part.flatten() for part in parts])

    of_target = gradient(callback.target[0])
    of_sources = [gradient(source[0]) for source in callback.sources.sources.values()]
    largest = max(float(g.norm()) for g in of_sources)
    expected = [float(g @ of_target) / (float(of_target.norm()) * largest) for g in of_sources]
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)  # as in the middle of an accumulation
    assert callback.alignment(5).tolist() == pytest.approx(expected, rel=1e-4)
    assert all(parameter.grad.eq(1).all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_the_model_is_trained_as_without_the_callback(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain, steered = (a_trainer(tmp_path, dropout=0.1, **settings) for _ in range(2))
    callback = MixtureCallback(steered, every=2, rate=1e-12)
    steered.add_callback(callback)
    for trainer in (plain, steered):
        torch.manual_seed(1)  # of dropout
        trainer.train()
    for before, after in zip(plain.model.parameters(), steered.model.parameters(), strict=True):
        assert torch.equal(before, after)
    updates = [row for row in steered.state.log_history if "mixture/useful" in row]
    assert [row["step"] for row in updates] == [2, 4, 6]
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (plain, steered)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


def test_the_source_of_the_target_wins_and_is_logged(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, steps=20)
    trainer.add_callback(MixtureCallback(trainer, every=2, warmup=3))
    trainer.train()
    assert isinstance(trainer.train_dataset, MixedSources)
    rows = [row for row in trainer.state.log_history if "mixture/useful" in row]
    assert rows[0]["step"] == 4
    shares = trainer.train_dataset.proportions
    assert shares["useful"] > 0.75
    assert rows[-1]["mixture/useful"] == pytest.approx(shares["useful"])
    assert sum(shares.values()) == pytest.approx(1)


def test_a_resumed_training_goes_on_from_the_last_proportions(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path)
    callback = MixtureCallback(trainer)
    trainer.state.global_step = 8
    trainer.state.log_history = [
        {"mixture/useful": 0.6, "mixture/useless": 0.4},
        {"mixture/useful": 0.9, "mixture/useless": 0.1},
        {"loss": 1.0},
    ]
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert callback.sources.proportions == pytest.approx({"useful": 0.9, "useless": 0.1})


# -- the dataset -------------------------------------------------------------------------------------------------------


def test_sources_are_drawn_in_their_proportions_and_each_example_once_before_again() -> None:
    data = MixedSources({"a": range(100), "b": range(100, 200)}, {"a": 3.0, "b": 1.0})
    found = list(islice(data, 400))
    assert sum(x < 100 for x in found) / 400 == pytest.approx(0.75, abs=0.07)
    of_a = [x for x in found if x < 100]
    assert set(Counter(of_a[:100]).values()) == {1}
    assert found == list(islice(data, 400))
    data.proportions = {"a": 0.0, "b": 1.0}
    assert min(islice(data, 50)) >= 100


def test_a_change_reaches_worker_processes() -> None:
    data = MixedSources({"a": [0] * 4, "b": [1] * 4}, {"a": 1.0, "b": 0.0})
    batches = iter(DataLoader(data, batch_size=4, num_workers=1, prefetch_factor=2))
    assert next(batches).sum() == 0
    data.proportions = {"a": 0.0, "b": 1.0}
    assert [int(next(batches).sum()) for _ in range(8)][-1] == 4


# -- errors ------------------------------------------------------------------------------------------------------------


def test_trainers_that_cannot_be_used(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path)
    target, sources = trainer.eval_dataset, trainer.train_dataset
    with pytest.raises(TypeError, match=r"trainer is a int; build a transformers\.Trainer first"):
        MixtureCallback(3)  # pyright: ignore[reportArgumentType]
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="the trainer has no eval_dataset"):
        MixtureCallback(trainer)
    MixtureCallback(trainer, target=target)
    trainer.eval_dataset = {"first": target}
    with pytest.raises(ValueError, match=r"target=eval_dataset\['first'\]"):
        MixtureCallback(trainer)
    with pytest.raises(ValueError, match="the target is empty"):
        MixtureCallback(trainer, target=[])
    with pytest.raises(TypeError, match="the target is a generator without a length"):
        MixtureCallback(trainer, target=(x for x in target))
    trainer.train_dataset = target
    with pytest.raises(TypeError, match="train_dataset is a list, whose proportions cannot be changed"):
        MixtureCallback(trainer, target=target)
    trainer.train_dataset, trainer.is_fsdp_enabled = sources, True
    with pytest.raises(ValueError, match="shards the parameters"):
        MixtureCallback(trainer, target=target)


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"every": 0}, "every=0"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"warmup": -1}, "w"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=f"^{fragment}"):
        MixtureCallback(a_trainer(tmp_path), **settings)


def test_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path)
    callback = MixtureCallback(trainer)
    with torch.no_grad():
        next(iter(trainer.model.parameters())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="on a batch of the target is NaN or infinite at step 3"):
        callback.alignment(3)


@pytest.mark.parametrize(
    ("sources", "proportions", "error", "fragment"),
    [
        ([1], None, TypeError, "sources is a list"),
        ({"a": [1]}, None, ValueError, "holds 1 source"),
        ({"a": [1], "b": []}, None, ValueError, "'b' is empty"),
        ({"a": [1], "b": iter([1])}, None, TypeError, "without a length and random access"),
        ({"a": [1], "b": [1]}, {"a": 1.0}, ValueError, "the sources are"),
        ({"a": [1], "b": [1]}, {"a": -1.0, "b": 1.0}, ValueError, "at least 0"),
        ({"a": [1], "b": [1]}, {"a": 0.0, "b": 0.0}, ValueError, "one above 0"),
    ],
)
def test_sources_that_cannot_be_used(sources: Any, proportions: Any, error: type[Exception], fragment: str) -> None:
    with pytest.raises(error, match=fragment):
        MixedSources(sources, proportions)
