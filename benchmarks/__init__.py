"""Benchmarks of the loss, run from the checkout.

python -m benchmarks              time, memory, accuracy and a training step, beside the
                                  alternatives, on the machine at hand; a record to `results/`
python -m benchmarks plot RECORD  that record's pictures, drawn anew
python -m benchmarks gpu          checks everything on the GPU at hand, and times each kernel
python -m benchmarks model        predicted times of the kernels: needs no GPU
python -m benchmarks scaling      the same on many ranks
python -m benchmarks semantics    what OpenCLIP's flags do to gradients over processes
pytest benchmarks                 single operators, for comparing one version with another
"""
