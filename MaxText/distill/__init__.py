"""The mathematics of distillation: arrays, numbers, projection functions and axis names in, arrays out.

Nothing here knows a config, a logger or MaxText, so every module can be tested, and reused, by itself.
"""
