"""The reference training script: a CLIP model trained with `CyCLIPLoss` on image-caption pairs.

`python -m reference_train` trains a small CLIP model on the emoji that ship with the repository,
once with the plain CLIP loss and once with CyCLIP, evaluates both on what training never saw,
prints one table and saves pictures. `python -m reference_train --help` lists the rest.

Read it in this order: `data.py` (what a batch is), `images.py`, `model.py`, `train.py` (the loop),
`evaluate.py`, `results.py`, `report.py` and `pictures.py`, `__main__.py` (the command line); over
several processes also `ranks.py` and `batch_norm.py`.
"""
