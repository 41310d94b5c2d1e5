"""How well the nano model does: its scores, a detector that reads rendered and drawn images, and a gallery."""
