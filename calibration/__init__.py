"""Calibration: samples, the dense model's answers, the profiler and its store. It predicts; nothing here decides on a plan."""
