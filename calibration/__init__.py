"""Calibration: data, generators, the dense model's answers, the profiler and its store. Nothing here decides on a plan."""
