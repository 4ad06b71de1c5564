"""One version of the operators against another, by pytest-benchmark."""
