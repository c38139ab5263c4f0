"""Data: sources that open anything as rows, datasets by name, and the loader."""

from .arrays import ArraySource, source_from_arrays
from .datasets import Dataset, resolve, split
from .loader import DataLoader, ShuffleWarning
from .shapes import ShapeSource
from .source import DataError, Source
from .sources import as_source, open_source
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
