"""Mixture: its hypergradient against a plain loop, its sources and files, sampling, the baselines, and a whole run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import cli, randomness
from bilevel.errors import DataError
from bilevel.tasks.mixture import baselines, models, text_files
from bilevel.tasks.mixture import problem as mixture
from bilevel.tasks.mixture.config import Mixture
from bilevel.tasks.mixture.sources import Sources, load

TINY = Mixture(
    tokens=4, examples=300, target_examples=40, inner_steps=5, batch=12, inner_lr=2.0, evaluation_steps=8, device="cpu"
)


@pytest.fixture
def double() -> Iterator[None]:
    """Models are made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# -- the hypergradient -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_with_weights_the_hypergradient_is_the_derivative_of_the_plain_loop(optimizer: Any) -> None:
    config, seed = replace(TINY, optimizer=optimizer, inner_lr=0.5), 3
    data = load(config, None, seed)
    made = mixture.setup(config, data, 1, seed)
    phi = torch.tensor([0.3, -0.2, 0.5, 0.0])
    batches = made.inner_batches_of(draw=2)
    estimate = bilevel.Reverse()(made.problem, phi, batches, None, seed)

    def value(phi: Tensor) -> float:
        """As anybody would write it."""
        with randomness.torch_seeded(seed, randomness.INIT):
            model = models.Table(config.tokens)
        p = torch.exp(phi) / torch.exp(phi).sum()
        if optimizer == "sgd":
            descent = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        else:
            descent = torch.optim.Adam(model.parameters(), lr=0.5, eps=1e-4)
        for candidates, _ in batches:
            loss = torch.zeros(())
            for number, examples in enumerate(candidates):
                log_p = model.logits.weight[examples[:, 0]].log_softmax(-1)
                loss = loss - p[number] * log_p[torch.arange(len(examples)), examples[:, 1]].mean()
            descent.zero_grad()
            loss.backward()
            descent.step()
        log_p = model.logits.weight[data.target[:, 0]].log_softmax(-1)
        return float(-log_p[torch.arange(len(data.target)), data.target[:, 1]].mean().detach())

    assert float(estimate.value) == pytest.approx(value(phi), rel=1e-9)
    for number in range(4):
        step = torch.zeros(4)
        step[number] = 1e-5
        assert float(estimate.grad[number]) == pytest.approx((value(phi + step) - value(phi - step)) / 2e-5, rel=1e-5)


@pytest.mark.usefixtures("double")
def test_with_sampling_the_gradient_and_its_derivative_are_right_in_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.2], requires_grad=True)
    logits = torch.randn(4, 4, generator=generator, requires_grad=True)
    source = torch.randint(0, 4, (3, 1, 2), generator=generator)

    def model(ids: Tensor) -> Tensor:
        return logits[ids]

    def by(chooses: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradient by the logits, and its derivative by p along fixed numbers v: vᵀ ∂(gradient)/∂p."""
        count = 1 if chooses is None else len(chooses)
        loss = mixture.mixed_loss(model, p, (source.expand(3, count, 2), chooses))
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        v = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
        return gradient.detach(), torch.autograd.grad((v * gradient).sum(), p)[0]

    # Every multiple of a tenth chooses once: the expectation over uniform numbers, exactly.
    sampled, exact = by((torch.arange(10) + 0.5) / 10), by(None)
    for found, expected in zip(sampled, exact, strict=True):
        torch.testing.assert_close(found, expected)


def test_sampling_takes_each_source_as_often_as_its_proportion_says() -> None:
    config = replace(TINY, act_as="sampling", batch=50)
    _, chooses = mixture.batch(config, load(config, None, 0), 0, 1, 2)
    assert chooses is not None
    for share in (0.1, 0.33, 0.7):
        assert abs(int((chooses < share).sum()) - 50 * share) < 1
    assert float(chooses.max()) < 1


def test_batches_are_a_function_of_seed_and_counters_and_come_from_their_source() -> None:
    data = load(TINY, None, 0)
    first, again, other = (mixture.batch(TINY, data, 0, 1, t)[0] for t in (2, 2, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for examples, source in zip(first, data.train.values(), strict=True):
        assert {tuple(e) for e in examples.tolist()} <= {tuple(e) for e in source.tolist()}


# -- sources -----------------------------------------------------------------------------------------------------------


def test_the_known_mixture_has_the_distribution_of_the_target() -> None:
    data = load(replace(TINY, examples=60_000, target_examples=60_000), None, 1)
    assert data.known == {"own": 0.6, "half useful": 0.4, "noise": 0.0, "other": 0.0}

    def table(pairs: Tensor) -> Tensor:
        return torch.bincount(4 * pairs[:, 0] + pairs[:, 1], minlength=16) / len(pairs)

    of = {name: table(each) for name, each in data.train.items()}
    assert data.known is not None
    mixed = sum(share * of[name] for name, share in data.known.items())
    assert isinstance(mixed, Tensor)
    assert float((mixed - table(data.target)).abs().max()) < 0.005
    assert float((of["own"] - table(data.target)).abs().max()) > 0.01
    assert float((of["noise"] - 1 / 16).abs().max()) < 0.005


def write_texts(folder: Path) -> None:
    (folder / "a.txt").write_text("abcdefgh" * 40)
    lines = [json.dumps({"text": "hgfedcba" * 20}), "", json.dumps({"text": "ä" * 80})]
    (folder / "b.jsonl").write_text("\n".join(lines))
    (folder / "target.txt").write_text("abcdefgh" * 40)
    (folder / "README.md").write_text("not a source")


SMALL_TEXT = Mixture(data="text", length=8, target_examples=10, batch=4, width=8, optimizer="adam", device="cpu")


def test_text_files_become_bytes(tmp_path: Path) -> None:
    write_texts(tmp_path)
    data = load(SMALL_TEXT, tmp_path, 0)
    assert data.names == ["a", "b"]
    assert bytes(data.train["a"][3].tolist()) == b"abcdefgh"
    assert bytes(data.train["b"].flatten().tolist()).startswith(b"hgfedcba" * 20 + b"\n" + "ä".encode() * 79)
    assert data.target.shape == data.test.shape == (10, 8)
    assert data.proportional().tolist() == pytest.approx([40 / 80, 40 / 80])  # 320 bytes, and 160 + 1 + 160


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda f: (f / "target.txt").unlink(), "has no file target.txt or target.jsonl"),
        (lambda f: (f / "a.txt").unlink(), "has 1 source besides the target"),
        (lambda f: (f / "a.txt").write_text("short"), "the source 'a' holds 0 examples"),
        (lambda f: (f / "target.txt").write_text("abcdefgh" * 5), "the target 'target' holds 5 examples"),
        (lambda f: (f / "b.jsonl").write_text('{"text": 3}'), "line 1: an object with the key"),
        (lambda f: (f / "b.jsonl").write_text('{"text": "a"}\n{'), "line 2, is no JSON"),
        (lambda f: (f / "c.txt.gz").write_bytes(b"no gzip"), "is damaged"),
        (lambda f: (f / "a.jsonl").write_text(""), "has two files for 'a'"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, change: Any, fragment: str) -> None:
    write_texts(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=re.escape(fragment)):
        load(SMALL_TEXT, tmp_path, 0)


def test_no_folder_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pass --data-dir FOLDER"):
        load(SMALL_TEXT, None, 0)
    with pytest.raises(DataError, match=r"holds no \.txt or \.jsonl file"):
        text_files.read_folder(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        text_files.read_folder(tmp_path / "missing")


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_regression_finds_the_minimum_of_a_quadratic_function() -> None:
    drawn = torch.distributions.Dirichlet(torch.ones(3)).sample((30,))
    best = torch.tensor([0.6, 0.3, 0.1])
    values = [float((p - best).square().sum()) for p in drawn]
    assert baselines.by_regression((drawn, values), seed=0).tolist() == pytest.approx(best.tolist(), abs=0.03)
    assert baselines.best_of((drawn, values)).equal(drawn[values.index(min(values))])


def test_alignment_prefers_the_source_that_equals_the_target() -> None:
    data = load(TINY, None, 0)
    same = Sources({"same": data.target, "noise": data.train["noise"]}, data.target, data.test, data.tokens)
    found = baselines.by_alignment(TINY, same, steps=60, seed=0)
    assert float(found.sum()) == pytest.approx(1)
    assert float(found[0]) > 0.6


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_finds_known_proportions_and_reports_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--preset rules-stream --tokens 8 --inner-lr 8 --outer-steps 50 --evaluation-runs 1 --batch 256"
    extra = "--evaluation-steps 60 --trial-trainings 4 --device cpu"
    cli.main(["run", "mixture", *flags.split(), *extra.split(), "--out", str(tmp_path / "run")])
    assert "proportion of own" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    shares = {name: found["mean"] for name, found in results["proportions"].items()}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert shares["noise"] < 0.1
    assert abs(shares["own"] - 0.6) < 0.15
    losses = {name: found["mean"] for name, found in results["target_loss"].items()}
    assert set(losses) == {
        *("found", "known", "uniform", "proportional", "alignment", "random_search", "regression", "target_alone")
    }
    assert losses["found"] < losses["uniform"]
    assert len(results["path"]) == 50
    assert results["path"][-1] == pytest.approx(results["chosen"]["found"], abs=1e-3)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert "exactly the distribution of the target" in page


def test_a_run_on_text_in_a_stream(tmp_path: Path) -> None:
    write_texts(tmp_path)
    small = "--length 8 --width 8 --batch 4 --target-examples 10 --outer-batch 5 --inner-steps 2 --outer-steps 3"
    cli.main(
        [
            *("run", "mixture", "--preset", "text", *small.split(), "--evaluation-steps", "4", "--act-as", "sampling"),
            *("--device", "cpu", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")),
        ]
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["sources"] == ["a", "b"]
    assert "known" not in results["target_loss"]
    assert results["path"][0] != results["path"][-1]


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        *(({name: 0}, f"{name}=0") for name in ("examples", "inner_steps", "batch", "target_examples")),
        ({"tokens": 1}, "tokens=1"),
        ({"outer_lr": 0.0}, "outer_lr=0.0"),
        ({"outer_batch": 9999}, "outer_batch=9999"),
        ({"trial_trainings": 2}, "trial_trainings=2"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(fragment)}: "):
        Mixture(**change)
