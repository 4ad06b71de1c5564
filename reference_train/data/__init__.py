"""The data sets of `reference_train`: one reader of samples, and a module for each set."""
