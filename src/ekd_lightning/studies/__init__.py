"""Many runs: sweeps, comparisons, searches."""
