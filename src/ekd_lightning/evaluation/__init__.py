"""Evaluation of networks: accuracy, calibration, diversity, robustness and cost."""
