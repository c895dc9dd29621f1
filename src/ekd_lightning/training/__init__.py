"""The run: LightningModules, teachers and their store, callbacks, loggers and the record."""
