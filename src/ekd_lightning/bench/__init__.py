"""Benchmark of speed and cost, side by side with a plain PyTorch loop on the same machine and work."""
