"""Training: the LightningModule, its steps and trainer, and teachers trained on demand."""
