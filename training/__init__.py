"""Trains and judges the nano model, from nothing, on top of `internvl_u`: `python -m training.train`."""
