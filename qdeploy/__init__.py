"""Quantize untrusted classifiers without switching on their hidden backdoors."""

__version__ = "0.1.0"
