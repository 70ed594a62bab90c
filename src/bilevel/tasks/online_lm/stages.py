"""The stage before the outer loop: tuning of a base model that answers questions about documents it has seen."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bilevel import randomness
from bilevel.errors import CheckpointError, NonFiniteError
from bilevel.report.files import remove_leftovers
from bilevel.report.progress import bar
from bilevel.tasks.online_lm import losses, models, tokens
from bilevel.tasks.online_lm.config import OnlineLM
from bilevel.tasks.online_lm.documents import Corpus, Document
from bilevel.training import checkpoint_files

FOLDER, BASE, JUDGE = "stages", "base", "judge"
_EVERY = 100


def tuned_model(
    config: OnlineLM, corpus: Corpus, seed: int, folder: Path | None, progress: bool, role: str = BASE
) -> tuple[Any, Any]:
    """Return the tuned language model for a role, in evaluation mode on its device, and its tokenizer.

    With a folder, a finished model is read from `stages/ROLE` (written by `save_pretrained`), an interrupted tuning
    continues from its checkpoint, and a newly tuned model is stored.
    """
    device = models.device_of(config)
    name = config.base if role == BASE else config.judge
    place = None if folder is None else folder / FOLDER / role
    if place is not None and place.exists():
        model, tokenizer = models.load(str(place))
        return model.to(device).eval(), tokenizer
    model, tokenizer = _from_scratch(config, corpus, seed) if name == "scratch" else models.load(name)
    require_room(config, model, name)
    tokens.end_of(tokenizer)
    report_truncation(config, corpus, tokenizer)
    path = None if place is None else _progress_of(place)
    model = _tuned(config, corpus, model.to(device), tokenizer, seed, path, progress)
    if place is not None:
        _save(model, tokenizer, place)
    return model, tokenizer


def require_room(config: OnlineLM, model: Any, name: str) -> None:
    """Raise a ValueError if the configured sequences are longer than the model accepts."""
    most = models.most_positions(model)
    needed = config.context + config.answer_tokens
    if most is not None and needed > most:
        raise ValueError(
            f"context={config.context} and answer_tokens={config.answer_tokens} need {needed} positions, but "
            f"{name} has {most}; take context={most - config.answer_tokens} or less"
        )


def report_truncation(config: OnlineLM, corpus: Corpus, tokenizer: Any) -> None:
    """Warn if documents are longer than the context, and say how many."""
    everything = [*corpus.tune, *corpus.meta, *corpus.validation, *corpus.test]
    cut = sum(tokens.document(tokenizer, each.text, config.context).truncated for each in everything)
    if cut:
        warnings.warn(
            f"{cut} of {len(everything)} documents are longer than context={config.context} tokens and are cut there; "
            "answers to questions about the rest cannot be learnt",
            stacklevel=2,
        )


def _from_scratch(config: OnlineLM, corpus: Corpus, seed: int) -> tuple[Any, Any]:
    asked = (tokens.prompt(q.text) + " " + q.answers[0] for each in corpus.tune for q in each.questions)
    known = [*(each.text for each in corpus.tune), *asked, *corpus.words]
    tokenizer = tokens.train_tokenizer(known, config.vocabulary)
    with randomness.torch_seeded(seed, randomness.LM_INIT), torch.no_grad():
        return models.from_scratch(config, tokenizer), tokenizer


def _tuned(
    config: OnlineLM, corpus: Corpus, model: Any, tokenizer: Any, seed: int, path: Path | None, progress: bool
) -> Any:
    if not config.tune_steps:
        return model.eval()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.tune_lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.tune_lr, total_steps=config.tune_steps + 1)
    done = 0
    if path is not None and path.exists():
        done = _restore(checkpoint_files.load(path), model, optimizer, schedule)
    with bar("tuning the base model", config.tune_steps, done, progress) as shown:
        for step in range(done, config.tune_steps):
            with randomness.torch_seeded(seed, randomness.LM_BATCH, step):
                loss = _tuning_loss(config, corpus, model.train(), tokenizer, seed, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            value = float(loss.detach())
            if value != value:
                raise NonFiniteError(
                    f"tuning step {step}: the loss is not a number; a smaller tune_lr is the usual cure"
                )
            if path is not None and (step + 1) % _EVERY == 0:
                _checkpoint(path, step + 1, model, optimizer, schedule)
            shown.advance(f"loss {value:.3f}")
    return model.eval()


def _tuning_loss(config: OnlineLM, corpus: Corpus, model: Any, tokenizer: Any, seed: int, step: int) -> torch.Tensor:
    """Compute the tuning loss on a batch that is a function of (seed, step).

    It is the loss of answers and, for a model from scratch, also that of documents.
    """
    device = next(model.parameters()).device
    generator = randomness.generator(seed, randomness.LM_BATCH, step)

    def drawn(count: int) -> list[Document]:
        return [corpus.tune[i] for i in generator.integers(len(corpus.tune), size=count)]

    asked = [each.questions[int(generator.integers(len(each.questions)))] for each in drawn(config.tune_batch)]
    batches = [tokens.questions(tokenizer, asked, config.context)]
    if config.tune_documents:
        batches.append(tokens.texts(tokenizer, [each.text for each in drawn(config.tune_documents)], config.context))
    total = torch.zeros((), device=device)
    for batch in batches:
        placed = batch.to(device)
        with losses.autocast(config.precision, device):
            logits = model(input_ids=placed.ids, attention_mask=placed.mask, use_cache=False).logits
        total = total + losses.answer_nll(logits.float(), placed.labels)
    return total


def _checkpoint(path: Path, done: int, model: Any, optimizer: Any, schedule: Any) -> None:
    state = {"done": done, "model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    checkpoint_files.save(path, {**state, "schedule": _plain(schedule.state_dict())})


def _restore(content: dict[str, Any], model: Any, optimizer: Any, schedule: Any) -> int:
    if content.keys() != {"done", "model", "optimizer", "schedule"}:
        raise CheckpointError("the tuning checkpoint was not written by this task; take another folder")
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["schedule"])
    return content["done"]


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers and strings in a schedule's state. The rest is code, which is the same in every process."""
    return {
        k: v for k, v in state.items() if isinstance(v, bool | int | float | str | None | Sequence) and not callable(v)
    }


def _save(model: Any, tokenizer: Any, place: Path) -> None:
    """Save the model completely or not at all: write into a neighbouring folder, and rename it in one operation."""
    temporary = place.with_name(f".{place.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _progress_of(place).unlink(missing_ok=True)
    remove_leftovers(_progress_of(place))


def _progress_of(place: Path) -> Path:
    """Return the path of the checkpoint of an unfinished tuning."""
    return place.with_name(f"{place.name}.safetensors")
