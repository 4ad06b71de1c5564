"""`python -m reference_train evaluate`: a checkpoint's numbers beside the paper's.

command.py      the arguments, and what is done with which data set
checkpoints.py  OpenCLIP checkpoints: found, loaded, and what they make features of
datasets.py     what a data set is; images in tar files
suites.py       the data sets by name, and where they are found
measure.py      which metrics a data set has
metrics.py      the metrics, on features alone
paper.py        the paper's numbers, each with its origin
report.py       table and picture
"""
