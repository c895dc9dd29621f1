"""Speed and cost, measured side by side with a plain PyTorch loop on the same machine and the same work."""
