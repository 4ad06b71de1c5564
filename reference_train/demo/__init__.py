"""The demonstration: small CLIP models on the emoji that ship, plain CLIP next to CyCLIP.

Read it in this order: `train.py` (the loop), `batches.py` (what a batch is), `model.py`,
`evaluate.py` (what is asked), `command.py` (the command line).
"""
