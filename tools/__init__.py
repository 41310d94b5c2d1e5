"""What developers use: environments, ComfyUI as a process, the demo, and the makers of the shipped workflows."""
