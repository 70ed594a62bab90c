"""Learn how much each training digit should count, if 40 % of the labels are wrong and 200 further ones are trusted.

python examples/example_weights.py [FOLDER]: writes a picture into the folder.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from bilevel.integrations.example_weights import ExampleWeights

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "example_weights")
folder.mkdir(parents=True, exist_ok=True)
generator = np.random.default_rng(0)
x, right = load_digits(return_X_y=True)
order = generator.permutation(len(x))
x, right = x[order], right[order]
wrong = generator.random(1000) < 0.4
given = np.where(wrong, (right[:1000] + generator.integers(1, 10, 1000)) % 10, right[:1000])

found = ExampleWeights(random_state=0).fit(x[:1000], given, X_clean=x[1000:1200], y_clean=right[1000:1200])
print(f"area under ROC of the weights: {roc_auc_score(wrong, -found.weights_):.3f}")
print(f"accuracy on {len(x) - 1200} other digits: {found.score(x[1200:], right[1200:]):.3f}")
found.plot().savefig(folder / "examples.png", dpi=80, bbox_inches="tight")
