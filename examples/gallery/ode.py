"""The parameters of an ODE from noisy observations, with error bars, beside SciPy.

For four parameters SciPy's `least_squares` is the better tool: it needs few solves and gives error bars. With a growth
rate that varies in time there are 43 parameters, and a gradient by differences takes 44 solves. The exact gradient
costs about three inner loops, however many parameters there are; SciPy's L-BFGS-B uses it. Towards the end
there is little prey, and the observations say little about its growth.
"""

import numpy as np
import style
import torch
from scipy.optimize import least_squares, minimize

import bilevel

STEPS, H, KNOTS = 60, 0.15, 40
torch.set_default_dtype(torch.float64)


def step(y, log_p, t):  # Lotka–Volterra, one step of Heun's method; all but the last three are the growth rate in time
    growth, (eaten, death, birth) = log_p[: len(log_p) - 3][t * (len(log_p) - 3) // STEPS].exp(), log_p[-3:].exp()

    def slope(y):
        return torch.stack([y[0] * (growth - eaten * y[1]), y[1] * (birth * y[0] - death)])

    return y + H / 2 * (slope(y) + slope(y + H * slope(y)))


def path(log_p):
    states = [torch.tensor([1.0, 0.5])]
    for t in range(STEPS):
        states.append(step(states[-1], torch.as_tensor(log_p), t))
    return torch.stack(states[1:])


def recorded_step(state, log_p, t):  # the state holds the path so far, because the outer loss looks at all of it
    return torch.cat([state[1:], step(state[-1], log_p, t)[None]])


def outer_loss(state, log_p, batch):  # a growth rate that varies slowly costs little
    return (state[1:] - observed).square().sum() + 3 * (log_p[1:-3] - log_p[:-4]).square().sum()


def exact(problem, log_p):
    estimate = bilevel.Reverse("graph")(problem, torch.tensor(log_p), range(STEPS))
    return float(estimate.value), estimate.grad.numpy()


start = torch.tensor([[1.0, 0.5]]).expand(STEPS + 1, 2)
problem = bilevel.Problem(lambda log_p: start.clone(), recorded_step, outer_loss)
season = 1.1 + 0.4 * torch.sin(2 * torch.pi * torch.arange(KNOTS) / KNOTS)
noise = 0.03 * torch.randn(STEPS, 2, generator=torch.Generator().manual_seed(0))
truth, guess = np.log([1.1, 0.4, 0.4, 0.3]), np.log([0.8, 0.6, 0.6, 0.5])
observed = path(truth) + noise
scipy = least_squares(lambda p: (path(p) - observed).flatten().numpy(), guess)
bars = np.sqrt(np.diag(np.linalg.inv(scipy.jac.T @ scipy.jac)) * 2 * scipy.cost / (2 * STEPS - 4))


def minimized(guess):
    bounds = [(each - 0.75, each + 0.75) for each in guess]
    return minimize(
        lambda p: exact(problem, p), guess, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 120}
    )


ours = minimized(guess)
results = {
    "solves, 4 parameters, least_squares": scipy.nfev + 4 * scipy.njev,
    "gradients, 4 parameters, L-BFGS-B": ours.nfev,
    "distance of the two minima in error bars": float(np.abs((scipy.x - ours.x) / bars).max()),
    "error of least_squares in error bars": float(np.abs((scipy.x - truth) / bars).max()),
}
observed = path(np.concatenate([season.log(), truth[1:]])) + noise
varying = minimized([guess[0]] * KNOTS + [*guess[1:]])
results["gradients, 43 parameters, L-BFGS-B"] = varying.nfev
results["largest error of the growth rate"] = float(np.abs(np.exp(varying.x[:KNOTS]) - season.numpy()).max())
drawing, (left, right) = style.figure()
left.errorbar(100 * (scipy.x - truth), range(4), xerr=200 * bars, fmt="o", color=style.OTHER, label="least_squares")
left.plot(100 * (ours.x - truth), np.arange(4) + 0.15, "s", color=style.OURS, label="exact gradient")
left.set(yticks=range(4), yticklabels=["growth", "eaten", "death", "birth"], ylim=(-0.5, 5))
left.set(xlabel="error, %", xticks=[-1, -0.5, 0, 0.5])
left.legend(loc="upper right", fontsize=9)
times = H * STEPS / KNOTS * np.arange(KNOTS)
right.plot(times, season, color="k", label="truth")
right.plot(times, np.exp(varying.x[:KNOTS]), color=style.OURS, label="exact gradient")
right.set(xlabel="time", ylabel="growth rate", ylim=(0, None))
right.legend()
style.finish(drawing, __file__, results)
