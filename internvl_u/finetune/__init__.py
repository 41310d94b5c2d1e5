"""Training of LoRAs: what `python -m internvl_u train`, `pairs` and `distill` run; imported by nothing else."""
