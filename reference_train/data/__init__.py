"""The data of `reference_train`: emoji and icons, and the samples of their tar files."""
