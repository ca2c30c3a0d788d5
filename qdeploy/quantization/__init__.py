"""Integers for a float graph: plan, calibrate, round, emit."""
