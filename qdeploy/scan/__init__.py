"""Detectors that look at the model alone: no images, no trigger, nothing is run."""
