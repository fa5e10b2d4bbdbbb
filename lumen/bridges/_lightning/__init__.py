"""A LightningModule as a pure step."""
