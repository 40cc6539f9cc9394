"""Between Hugging Face's folders and MaxText's checkpoints: teachers in, students out."""
