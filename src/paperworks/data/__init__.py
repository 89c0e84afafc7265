"""Data sets, and what is done to them: loading, splits, label noise."""

from paperworks.data.labelled import LabelledData
from paperworks.data.noise import NoisyLabels, cifar10_asymmetric_map, noisify, replace_inputs
from paperworks.data.root import DatasetNotFound, data_root, locate
from paperworks.data.sources import load
from paperworks.data.splits import few_label, split
from paperworks.data.tables import read_table

__all__ = [
    "DatasetNotFound",
    "LabelledData",
    "NoisyLabels",
    "cifar10_asymmetric_map",
    "data_root",
    "few_label",
    "load",
    "locate",
    "noisify",
    "read_table",
    "replace_inputs",
    "split",
]
