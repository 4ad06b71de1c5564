"""The demonstration: small CLIP models on the emoji that ship. Read `train.py` first, the loop."""
