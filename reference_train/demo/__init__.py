"""The demonstration: small CLIP models on the emoji that ship, plain CLIP beside CyCLIP.

Read it in this order: `batches.py` (what a batch is), `images.py`, `model.py`, `train.py` (the
loop), `evaluate.py`, `report.py` and `pictures.py`, `command.py` (the command line).
"""
