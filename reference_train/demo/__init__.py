"""The demonstration: small CLIP models on the emoji that ship. `train.py` has the loop."""
