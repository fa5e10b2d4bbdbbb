"""Convert a LightningModule to a pure step."""
