"""Data: sources that open anything as rows, datasets by name, and the loader."""

from .datasets import Dataset, resolve, split
from .loader import DataLoader, ShuffleWarning
from .shapes import ShapeSource
from .sources import ArraySource, DataError, Source, as_source, open_source, source_from_arrays
from .sparse import SparseSource, counts
from .transform import Transform

__all__ = [
    "ArraySource",
    "DataError",
    "DataLoader",
    "Dataset",
    "ShapeSource",
    "ShuffleWarning",
    "Source",
    "SparseSource",
    "Transform",
    "as_source",
    "counts",
    "open_source",
    "resolve",
    "source_from_arrays",
    "split",
]
