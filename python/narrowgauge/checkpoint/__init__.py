"""Checkpoints: directories of safetensors shards and a manifest, committed whole or not at all."""
