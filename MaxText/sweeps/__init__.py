"""Small grids of runs: which runs a file asks for, and what is in their folders."""
