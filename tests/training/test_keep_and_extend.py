"""`fit` returns the best meta parameters if asked, is made longer, is stopped, and its result is saved and shown."""

from __future__ import annotations

import pydoc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import bilevel
from bilevel import cli
from bilevel.errors import CheckpointError
from bilevel.training.outer_loop import OuterStep

START = torch.tensor([2.0, -1.0], dtype=torch.float64)


def outer_loss(theta: Tensor, phi: Any, batch: Any) -> Tensor:
    return 0.5 * (theta - 1.0).square().sum()


PROBLEM = bilevel.GradientDescent(
    lambda theta, phi, batch: 0.5 * (theta - phi).square().sum(),
    outer_loss,
    torch.zeros(2, dtype=torch.float64),
    bilevel.optimizer(torch.optim.SGD, lr=0.5),
)
SHRINK = 1 - 0.5**3


def fit(steps: int = 6, lr: float = 0.5, meta: Any = START, **settings: Any) -> bilevel.FitResult:
    given: dict[str, Any] = {"estimator": bilevel.Reverse(), "steps": steps, "progress": False, **settings}
    optimizer = bilevel.optimizer(torch.optim.SGD, lr=lr)
    return bilevel.fit(PROBLEM, meta, 3, optimizer=optimizer, **given)


def loss_at(meta: Tensor) -> float:
    return 0.5 * (SHRINK * meta - 1.0).square().sum().item()


def trajectory(steps: int, lr: float) -> list[Tensor]:
    points = [START]
    for _ in range(steps):
        points.append(points[-1] - lr * SHRINK * (SHRINK * points[-1] - 1.0))
    return points


# -- keep --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.5, 3.0], ids=["converging", "diverging"])
def test_the_best_by_outer_loss_with_the_last_one_among_them(lr: float) -> None:
    points = trajectory(6, lr)
    best = min(points, key=loss_at)
    assert torch.equal(best, points[-1] if lr == 0.5 else points[0])
    torch.testing.assert_close(fit(lr=lr, keep="best").meta, best)
    torch.testing.assert_close(fit(lr=lr).meta, points[-1])


def test_the_best_by_a_metric_of_ones_own_and_in_a_module_in_place() -> None:
    points = trajectory(6, 0.5)
    wanted = min(points[1:], key=lambda p: abs(p[0] - 1.6))

    def metric(step: Any) -> Tensor:
        return (step.meta[0] - 1.6).abs()

    result = fit(keep=metric)
    torch.testing.assert_close(result.meta, wanted)
    assert not torch.equal(wanted, points[-1])
    assert [row["kept_by"] for row in result.history] == pytest.approx([abs(p[0].item() - 1.6) for p in points[1:]])

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phi = nn.Parameter(START.clone())

    problem = bilevel.GradientDescent(
        lambda theta, m, b: 0.5 * (theta - m.phi).square().sum(),
        outer_loss, torch.zeros(2).double(), bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )  # fmt: skip
    module = Holder()
    bilevel.fit(
        problem, module, 3, estimator=bilevel.Reverse(), steps=6, progress=False, keep="best",
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=3.0),
    )  # fmt: skip
    torch.testing.assert_close(module.phi.detach(), START)


@pytest.mark.parametrize("keep", ["best", lambda step: float(step.meta[0])], ids=["loss", "metric"])
def test_the_best_survives_an_interruption(keep: Any, tmp_path: Path) -> None:
    wanted = fit(lr=3.0, keep=keep)
    fit(lr=3.0, keep=keep, out=tmp_path, callbacks=[lambda step: step.stop() if step.number == 3 else None])
    resumed = fit(lr=3.0, keep=keep, out=bilevel.RunFolder(tmp_path, resume=True))
    assert torch.equal(resumed.meta, wanted.meta)
    with pytest.raises(CheckpointError, match="keep"):
        fit(lr=3.0, out=bilevel.RunFolder(tmp_path, resume=True))


@pytest.mark.parametrize(("keep", "error"), [("worst", ValueError), (3, ValueError), (lambda step: "good", TypeError)])
def test_what_is_kept_must_be_said(keep: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="keep"):
        fit(keep=keep)


# -- longer, and shorter -----------------------------------------------------------------------------------------------


def noisy(steps: int | None, out: Any = None, **settings: Any) -> bilevel.FitResult:
    settings = {"estimator": bilevel.ForwardGradient(1), "steps": steps, **settings}
    adam = bilevel.optimizer(torch.optim.Adam, lr=0.1)
    return bilevel.fit(PROBLEM, START, 3, None, 7, optimizer=adam, out=out, progress=False, **settings)


@pytest.mark.parametrize("phases", [False, True])
def test_a_finished_run_is_made_longer(phases: bool, tmp_path: Path) -> None:
    def run(steps: int, out: Any = None) -> bilevel.FitResult:
        if not phases:
            return noisy(steps, out)
        last = bilevel.Phase(bilevel.ForwardGradient(1), steps, patience=50)
        return noisy(None, out, estimator=None, phases=[bilevel.Phase(bilevel.Reverse(), 2), last])

    whole = run(8)
    run(6, tmp_path)
    longer = run(8, bilevel.RunFolder(tmp_path, resume=True))
    assert torch.equal(longer.meta, whole.meta)
    plain = [[{**row, "seconds": 0} for row in result.history] for result in (longer, whole)]
    assert plain[0] == plain[1]
    with pytest.raises(ValueError, match="8 steps of the last phase are done, and it has 5 now"):
        run(5, bilevel.RunFolder(tmp_path, resume=True))


def test_a_callback_ends_the_run_and_it_can_go_on(tmp_path: Path) -> None:
    stopped = fit(out=tmp_path, callbacks=[lambda step: step.stop() if step.row["outer_loss"] < 0.5 else None])
    wanted = next(k for k, point in enumerate(trajectory(6, 0.5)) if loss_at(point) < 0.5) + 1
    assert len(stopped.history) == wanted < 6
    torch.testing.assert_close(stopped.meta, trajectory(6, 0.5)[wanted])
    resumed = fit(out=bilevel.RunFolder(tmp_path, resume=True))
    assert torch.equal(resumed.meta, fit().meta)


# -- saved and shown ---------------------------------------------------------------------------------------------------


def test_a_result_is_saved_and_read_back(tmp_path: Path) -> None:
    result = fit()
    result.save(tmp_path / "phi.safetensors")
    torch.testing.assert_close(safetensors.torch.load_file(tmp_path / "phi.safetensors"), {"meta": result.meta})
    layer = nn.Linear(2, 1)
    bilevel.FitResult(layer, []).save(str(tmp_path / "layer.safetensors"))
    copy = nn.Linear(2, 1)
    copy.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    torch.testing.assert_close(copy.weight, layer.weight)


def test_a_result_is_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the package matplotlib is not installed")
    figure = fit().plot(tmp_path / "run.png")
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == list(range(6))
    assert line.get_ydata()[0] == pytest.approx(loss_at(START))
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no outer steps"):
        bilevel.FitResult(START, []).plot()


def test_the_command_writes_the_page_of_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2", reason="the package jinja2 is not installed")
    fit(out=tmp_path / "mine")
    cli.main(["report", str(tmp_path / "mine")])
    text = (tmp_path / "mine" / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path / "mine" / "report.html") in capsys.readouterr().out
    assert "6 outer steps" in text
    assert "Reverse" in text
    assert f"{loss_at(START):.4g}" in text


def test_results_are_printed_in_one_short_line() -> None:
    shown = repr(fit())
    assert shown.startswith("FitResult(meta: tensor of shape (2,), 6 outer steps, outer loss ")
    assert len(shown) < 120


@pytest.mark.parametrize("kind", [bilevel.Estimate, bilevel.FitResult, OuterStep], ids=lambda k: k.__name__)
def test_help_explains_every_field(kind: Any) -> None:
    fields = getattr(kind, "__dataclass_fields__", {})
    text = pydoc.render_doc(kind, renderer=pydoc.plaintext)  # pyright: ignore[reportAttributeAccessIssue]
    explained = text.split("Attributes:")[1]
    assert all(f"{name}: " in explained for name in fields if not name.startswith("_"))
