"""Pretraining with OpenCLIP's trainer and the CyCLIP loss, with presets for its flags."""
