"""Comparators: other ways of making a base refuse one category, as interventions. None of them is exported or served."""

from paving.steering.activation_steering import ActivationSteering, fit_activation_steering
from paving.steering.behaviour import Behaviour, BehaviourConfig, fit_behaviour
from paving.steering.cast import ConditionalSteering, fit_cast
from paving.steering.checks import SteeringError
from paving.steering.condition import Condition, ConditionConfig, fit_condition
from paving.steering.weight_delta import WeightDelta, load_weight_delta, save_weight_delta
from paving.steering.weight_steering import WeightSteering, WeightSteeringConfig, fit_weight_steering

__all__ = [
    "ActivationSteering",
    "Behaviour",
    "BehaviourConfig",
    "Condition",
    "ConditionConfig",
    "ConditionalSteering",
    "SteeringError",
    "WeightDelta",
    "WeightSteering",
    "WeightSteeringConfig",
    "fit_activation_steering",
    "fit_behaviour",
    "fit_cast",
    "fit_condition",
    "fit_weight_steering",
    "load_weight_delta",
    "save_weight_delta",
]
