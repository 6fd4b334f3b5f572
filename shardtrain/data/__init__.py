"""Text and arrays, in an order that is a function of the seed alone."""

from shardtrain.data.loader import ArrayLoader, TokenLoader, as_loader
from shardtrain.data.prefetch import prefetch
from shardtrain.data.prepare import TokenData, open_tokens, prepare

__all__ = ["ArrayLoader", "TokenData", "TokenLoader", "as_loader", "open_tokens", "prefetch", "prepare"]
