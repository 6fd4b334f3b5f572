"""Rules, annotations and constraints: where arrays live."""

from shardtrain.sharding.annotate import Annotations, annotate
from shardtrain.sharding.constrain import constrain, logical
from shardtrain.sharding.rules import Rules

__all__ = ["Annotations", "Rules", "annotate", "constrain", "logical"]
