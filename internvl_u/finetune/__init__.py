"""Fine-tuning with LoRA: imported by the commands that train, and by nothing else."""
