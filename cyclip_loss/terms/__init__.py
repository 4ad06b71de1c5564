"""What is computed, independent of where: contrastive terms, penalties, log-sum-exps."""
