"""Results of many runs: statistics, tables, figures, page and model card."""
