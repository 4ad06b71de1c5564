"""CLIP and CyCLIP trained and evaluated by one command each; `python -m reference_train --help`.

- `demo/`: with no further word, the five-minute demonstration on the emoji that ship;
- `pretrain/`: OpenCLIP's trainer with `CyCLIPLoss`;
- `evaluate/`: any OpenCLIP checkpoint, beside the paper's numbers;
- `data/`: the data sets that ship or that a command builds.
"""
