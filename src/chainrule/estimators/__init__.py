"""How the rewards of a batch become the gradient of an update: along the chain, by likelihood ratios, or by a critic.

A method says which (`chainrule.methods.Needs.estimator`); here are the three that do it, by one contract.
"""

from __future__ import annotations

from chainrule.estimators.batch import Batch, Estimator, Paths
from chainrule.estimators.critic import ActorCritic
from chainrule.estimators.flat import Flat
from chainrule.estimators.rollouts import Rollouts
from chainrule.methods import Critic, LikelihoodRatio, Pathwise
from chainrule.methods import Estimator as Kind
from chainrule.models import Model
from chainrule.rewards import Reward

__all__ = ["ActorCritic", "Batch", "Estimator", "Flat", "Paths", "Rollouts", "estimator_of"]


def estimator_of(kind: Kind, model: Model, reward: Reward, *, lr: float, clip: float, seed: int) -> Estimator:
    """The estimator of a kind, before its first update.

    Raises UserError for likelihood ratios of a sampler that draws no noise, and for a critic on a reward without a network.
    """
    match kind:
        case Pathwise():
            return Paths()
        case LikelihoodRatio():
            return Rollouts.of(kind, model)
        case Critic():
            return ActorCritic.of(kind, model, reward, lr=lr, clip=clip, seed=seed)
