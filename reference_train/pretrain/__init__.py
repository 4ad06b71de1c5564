"""Pretraining at any size: OpenCLIP's trainer with the CyCLIP loss, by presets."""
