"""Text to tokens: sources of examples, exact-length assembly, and the training mixture."""

from lrsa.data.assembly import SampleSet
from lrsa.data.built import build_samples, content_hash
from lrsa.data.datamodule import LRSADataModule, collate
from lrsa.data.examples import DataRowError, Document, Example
from lrsa.data.sample import ContextTooLongError, Sample
from lrsa.data.sources import SOURCES, load_examples

__all__ = [
    "SOURCES",
    "ContextTooLongError",
    "DataRowError",
    "Document",
    "Example",
    "LRSADataModule",
    "Sample",
    "SampleSet",
    "build_samples",
    "collate",
    "content_hash",
    "load_examples",
]
