"""A student cut from its teacher: what is kept of it, and why."""
