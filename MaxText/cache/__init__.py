"""Teacher targets, computed once: their format, the files they lie in, and how rows are read from them."""

from MaxText.cache.reading import rows

__all__ = ["rows"]
