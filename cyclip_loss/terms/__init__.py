"""What is computed, independent of where: the contrastive term, the penalties, log-sum-exps."""
