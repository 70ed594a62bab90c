"""Evaluate the trained meta parameters of a run again, with other networks, steps or numbers of repetitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from bilevel import trees
from bilevel.errors import DataError
from bilevel.report.files import write_json
from bilevel.tasks.run_folder import CONFIG, read_json
from bilevel.tasks.task import Task
from bilevel.training import checkpoint_files
from bilevel.training.run_record import CHECKPOINT

EVALUATION = "evaluation.json"


def task_of(folder: Path) -> str:
    """Return the name of the task whose run a folder holds.

    Raises:
        DataError: the folder holds no run of a task.
    """
    name = read_json(folder / CONFIG).get("task")
    if not isinstance(name, str):
        raise DataError(f"{folder / CONFIG} names no task; the folder of a `bilevel run` is needed")
    return name


def config_of(task: Task[Any], folder: Path) -> Any:
    """Return the settings with which a run was made.

    Raises:
        DataError: the settings in the folder are not those of this version of the task.
    """
    content = read_json(folder / CONFIG)
    kind = type(next(iter(task.presets.values())).config)
    found = {field.name: content[field.name] for field in dataclasses.fields(kind) if field.name in content}
    hints = get_type_hints(kind)
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    try:
        return kind(**found)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{folder / CONFIG} has settings that {kind.__name__} ({', '.join(hints)}) does not take: {error}"
        ) from error


def meta_of(task: Task[Any], folder: Path, data_dir: Path | None, seed: int) -> Any:
    """Return the meta parameters in the last checkpoint of a run.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        DataError: the checkpoint belongs to a run with other settings.
    """
    config = config_of(task, folder)
    start = trees.split(task.setup(config, data_dir, 1, seed).meta)
    leaves = checkpoint_files.load(folder / CHECKPOINT)["meta"]
    wanted, found = ([tuple(leaf.shape) for leaf in each] for each in (start.differentiable, leaves))
    if wanted != found:
        raise DataError(
            f"{folder / CHECKPOINT} holds meta parameters of the shapes {found}, and the settings in "
            f"{folder / CONFIG} make {wanted}; is it the --data-dir of the run?"
        )
    return start.rebuild([leaf.to(like.device) for leaf, like in zip(leaves, start.differentiable, strict=True)])


def evaluate(
    task: Task[Any], folder: Path, config: Any, data_dir: Path | None, seed: int | None, progress: bool = True
) -> dict[str, Any]:
    """Evaluate the meta parameters of a run, and write `evaluation.json` into its folder.

    Args:
        task: the task of the run.
        folder: the folder of the run, which may be unfinished.
        config: the settings for the evaluation. Those of the run are in `config_of`.
        data_dir: the folder with the data files.
        seed: the seed of the evaluation; `None` for that of the run, which repeats the run's own evaluation.
        progress: whether to show a progress bar.
    """
    own_seed = read_json(folder / CONFIG)["seed"]
    chosen = own_seed if seed is None else seed
    task = task.prepared(config_of(task, folder), data_dir, folder, own_seed, progress)
    meta = meta_of(task, folder, data_dir, own_seed)
    results = task.evaluate(config, data_dir, meta, chosen, progress)
    write_json(folder / EVALUATION, {"task": task.name, **dataclasses.asdict(config), "seed": chosen, **results})
    return results
