"""Lists of pictures and texts made by several workers on Ray Data: `python -m internvl_u batch`."""
