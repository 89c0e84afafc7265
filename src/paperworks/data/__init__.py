"""Data sets, and what is done to them: loading, splits, label noise, domains, biased mixtures."""

from paperworks.data.biased import SourcedData, confounded_split, load_folders, merge
from paperworks.data.domains import DomainData, DomainFolders, rotate, rotated
from paperworks.data.labelled import LabelledData
from paperworks.data.noise import NoisyLabels, cifar10_asymmetric_map, noisify, replace_inputs
from paperworks.data.root import DatasetNotFound, data_root, locate
from paperworks.data.sources import load
from paperworks.data.splits import few_label, split
from paperworks.data.tables import read_table
from paperworks.data.text import LabelledTexts, load_text

__all__ = [
    "DatasetNotFound",
    "DomainData",
    "DomainFolders",
    "LabelledData",
    "LabelledTexts",
    "NoisyLabels",
    "SourcedData",
    "cifar10_asymmetric_map",
    "confounded_split",
    "data_root",
    "few_label",
    "load",
    "load_folders",
    "load_text",
    "locate",
    "merge",
    "noisify",
    "read_table",
    "replace_inputs",
    "rotate",
    "rotated",
    "split",
]
