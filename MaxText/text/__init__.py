"""Text into what the input pipelines read."""
