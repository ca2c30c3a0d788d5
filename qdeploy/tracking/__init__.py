"""Runs as entries of an experiment tracker."""
