"""Training of LoRAs for InternVL-U: what `python -m internvl_u train`, `pairs` and `distill` run."""
