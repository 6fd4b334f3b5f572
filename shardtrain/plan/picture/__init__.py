"""What a plan or a search found, as one page without a network, and in a cell of a notebook."""

from shardtrain.plan.picture.page import fragment, page

__all__ = ["fragment", "page"]
