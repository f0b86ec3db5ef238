"""Prediction, calibration, in-context learning and costs."""
