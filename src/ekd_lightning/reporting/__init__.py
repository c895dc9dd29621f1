"""Results of many runs, as tables."""
