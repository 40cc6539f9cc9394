"""What MaxText's input pipelines are held to: every token of the data counts, once."""
