"""The Hydra configuration tree, shipped inside the package as `ekd_lightning.conf`."""
