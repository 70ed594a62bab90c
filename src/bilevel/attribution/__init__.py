"""Which training examples made a model what it is: scores of examples, and how well they predict a retraining."""

from bilevel.attribution.attribute import attribute
from bilevel.attribution.baselines import BASELINES, gradient_cosine
from bilevel.attribution.lds import DatamodelingScore, linear_datamodeling_score
from bilevel.attribution.metasmoothness import metasmoothness
from bilevel.attribution.result import Attribution
from bilevel.attribution.retraining import Retrained, retrain
from bilevel.attribution.weighted_training import Recipe, WeightedTraining

__all__ = [
    "BASELINES",
    "Attribution",
    "DatamodelingScore",
    "Recipe",
    "Retrained",
    "WeightedTraining",
    "attribute",
    "gradient_cosine",
    "linear_datamodeling_score",
    "metasmoothness",
    "retrain",
]
