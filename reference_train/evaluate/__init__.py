"""`python -m reference_train evaluate` and `report`: a checkpoint's numbers, and their table.

command.py      the arguments; what is evaluated, and what an earlier command already did
checkpoints.py  OpenCLIP checkpoints: found, loaded, and encoding images and texts
datasets.py     what a data set is; images in tar files, in folders, in memory
suites.py       the data sets by name, and where they are found
measure.py      which metrics a data set has
metrics.py      the metrics, on features alone
paper.py        the paper's numbers, and the test splits they are of
table.py        the table, and the numbers in it
pictures.py     the pictures
report.py       evaluation.json; `report`, which makes table and picture of it again
"""
