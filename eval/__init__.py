"""Evaluation of fine-tuned models on the field's benchmarks, and the study of the methods."""
