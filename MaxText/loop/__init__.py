"""The train and evaluation steps, and everything around them while a run goes on."""
