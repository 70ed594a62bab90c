"""A hypergradient with a closed form, taken with the installed package: what a release must be able to do.

    python tests/release/first_hypergradient.py

The optional packages are not needed. Prints where the package lies.
"""

from pathlib import Path

import torch

import bilevel

problem = bilevel.GradientDescent(
    inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi).square().sum(),
    outer_loss=lambda theta, phi, batch: theta.square().sum(),
    params=torch.zeros(3, dtype=torch.float64),
    optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
)
phi = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
closed_form = 2 * (1 - 0.5**4) ** 2 * phi  # θ_4 = (1 − 0.5⁴) φ
for estimator in (bilevel.Reverse("sqrt"), bilevel.Forward(), bilevel.ForwardGradient(3, distribution="coordinate")):
    estimate = estimator(problem, phi, 4)
    torch.testing.assert_close(estimate.grad, closed_form)
result = bilevel.fit(problem, phi, 4, estimator=bilevel.Reverse(), steps=3, progress=False)
if not result.history[-1]["outer_loss"] < result.history[0]["outer_loss"]:
    raise SystemExit("fit does not lower the outer loss")
print(Path(bilevel.__file__).parent)
